"""Makes texts of users (names of classes and files, captions) fit one line that is safe to show."""

from collections import Counter
from collections.abc import Sequence

from vit_jax.errors import visible

_ELLIPSIS = "…"


def one_line(text: str, limit: int = 0) -> str:
    """Returns `text` on one line, with single spaces, and every character visible.

    limit: the largest number of characters; a longer text is cut and ends in an ellipsis. 0 means
      no limit.
    """
    text = visible(" ".join(text.split()))
    return text[: limit - 1] + _ELLIPSIS if 0 < limit < len(text) else text


def code_span(text: object) -> str:
    """Returns `text` as a code span of Markdown on one line, where no character has a meaning."""
    plain = one_line(str(text)).replace("`", "'")
    return f"`{plain}`"


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Returns names on one line each; equal ones with their numbers, as in `cat (3)`.

    Two metrics or columns of one name would be one. If a name looks like another one with its
    number, all names get their numbers.
    """
    lines = [one_line(name) for name in names]
    numbered = tuple(f"{line} ({number})" for number, line in enumerate(lines))
    often = Counter(lines)
    found = tuple(n if often[line] > 1 else line for n, line in zip(numbered, lines, strict=True))
    return found if len(set(found)) == len(found) else numbered
