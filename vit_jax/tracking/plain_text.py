"""Makes texts of users (names of classes and files, captions) safe to show.

A name may contain line breaks, escape codes of terminals, marks that reverse the direction of text,
and unpaired surrogates from file names that are not valid UTF-8.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

_ELLIPSIS = "…"


def visible(text: str) -> str:
    r"""Returns `text` with characters that are not visible as escapes such as `\x1b`.

    These are control characters (including line breaks and tabs), marks that override the direction
    of text, unpaired surrogates and code points that are not characters.
    """
    return "".join(char.encode("unicode_escape").decode() if _acts(char) else char for char in text)


def visible_lines(text: str) -> str:
    """Returns a text of several lines with all characters but its line breaks visible."""
    return "\n".join(map(visible, text.split("\n")))


def show(text: object, file: TextIO | None = None) -> None:
    """Prints a text, parts of which may come from files, so that it cannot act on the terminal.

    Args:
      file: the stream; None for the standard output.
    """
    print(visible_lines(str(text)), file=file)


def one_line(text: str, limit: int = 0) -> str:
    """Returns `text` on one line, with single spaces, and every character visible.

    limit: the largest number of characters; a longer text is cut and ends in an ellipsis. 0 means
      no limit.
    """
    text = visible(" ".join(text.split()))
    return text[: limit - 1] + _ELLIPSIS if 0 < limit < len(text) else text


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


def _acts(char: str) -> bool:
    if char.isascii():
        return not char.isprintable()
    code = ord(char)
    return (
        unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(char) in _OVERRIDES
        or code & 0xFFFE == 0xFFFE
        or 0xFDD0 <= code <= 0xFDEF
    )


_OVERRIDES = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
