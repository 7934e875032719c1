"""The errors that end a command, their exit codes, and how texts are shown.

Exit codes: 0 success; 1 an unexpected error; 2 the user's input was wrong (`UserError`); 3 the plan
does not fit into memory; 75 the run was interrupted, and the same command resumes it from its last
save (`Interrupted`, `LostProcess`, `CannotSave`). The value 75 is EX_TEMPFAIL of BSD, after which
schedulers restart a job.
"""

import difflib
import os
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any, TextIO

FAILURE = 1


class UserError(Exception):
    """The input was wrong. The message is one line: the mistake, its position, and a correction."""

    exit_code = 2


class DoesNotFit(Exception):
    """A plan needs more memory than available. The message is one line with the difference."""

    exit_code = 3


class Interrupted(Exception):
    """A signal stopped the run after its state was saved. The message names the step."""

    exit_code = 75


class LostProcess(Exception):
    """Another process of this run ended. The saved state is complete, and all may restart."""

    exit_code = 75


class CannotSave(Exception):
    """Storage failed in one of several processes, which cannot retry the save on its own."""

    exit_code = 75


class Diverged(Exception):
    """Too many consecutive steps were not finite. The message is one line; the state is saved."""

    exit_code = FAILURE


class WrongExport(Exception):
    """The outputs of an exported program are not those of the model. The message is one line."""

    exit_code = FAILURE


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether the host lacks memory, or a device, or the compiler's plan for it.

    Object stores also report RESOURCE_EXHAUSTED, for rate limits, so the message must name memory.
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or ("resource_exhausted" in text and "allocat" in text)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without the pages that some libraries add.

    It is the type of an error without a message, such as `MemoryError()`.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_LINE_LENGTH]


_LINE_LENGTH = 300
_QUOTED_LENGTH = 200


def nearest(name: str, valid: Iterable[str], otherwise: str = "") -> str:
    """Returns a suggestion for a misspelled `name`: the closest of `valid`, or else all of them.

    The result is a clause to append to an error message, such as `did you mean 'lr'?`. If no name
    is close, `otherwise` replaces the list.
    """
    valid = sorted(map(str, valid))
    name, lowered = name[:_QUOTED_LENGTH], {one.lower(): one for one in valid}
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    close += difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0] if close[0] in valid else lowered[close[0]]!r}?"
    return otherwise or (f"valid: {', '.join(valid)}" if valid else "none is valid here")


def quoted(value: Any) -> str:
    """Returns a value for an error message: its `repr` on one line, shortened if it is long."""
    try:
        text = " ".join(line.strip() for line in repr(value).splitlines())
    except (RecursionError, MemoryError, ValueError):
        text = f"a {type(value).__name__}"
    if len(text) <= _QUOTED_LENGTH:
        return text
    return f"{text[: _QUOTED_LENGTH - 20]}...{text[-10:]}"


def program() -> str:
    """Returns the command with which the user called this program, for messages that show one.

    `run.sh`, which calls the program for the user, sets VIT_JAX_PROGRAM.
    """
    called = os.path.basename(sys.argv[0]).removesuffix(".exe")
    return os.environ.get("VIT_JAX_PROGRAM") or (
        called if called == "vit-jax" else "python -m vit_jax"
    )


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

    A name may contain line breaks, escape codes of terminals, marks that reverse the direction of
    text, and unpaired surrogates from file names that are not valid UTF-8.

    Args:
      file: the stream; None for the standard output.
    """
    print(visible_lines(str(text)), file=file)


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
