"""The errors that end a command, and the exit codes they map to.

Exit codes: 0 done; 1 anything unforeseen; 2 the user's input was wrong (`UserError`); 3 the plan
does not fit; 75 interrupted, and the same command goes on from what is saved (`Interrupted`,
`LostProcess`, `CannotSave`; the value is BSD's EX_TEMPFAIL, on which schedulers restart).
"""

import difflib
import os
import sys
from collections.abc import Iterable
from typing import Any

FAILURE = 1


class UserError(Exception):
    """The input was wrong. The message is one line: what, where, and what to write instead."""

    exit_code = 2


class DoesNotFit(Exception):
    """What was planned needs more memory than there is. The message is one line: by how much."""

    exit_code = 3


class Interrupted(Exception):
    """A signal asked the run to stop and its state was saved. The message names the step."""

    exit_code = 75


class LostProcess(Exception):
    """Another process of this run is gone; what was saved is whole, and all may start again."""

    exit_code = 75


class CannotSave(Exception):
    """Storage failed one of several processes, which cannot try the save again by themselves."""

    exit_code = 75


class Diverged(Exception):
    """Too many steps in a row were not finite. The message is one line, the state is saved."""

    exit_code = FAILURE


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is XLA's word that a device, or the compiler's plan for it, has no room.

    Object stores, too, say RESOURCE_EXHAUSTED, of their rates: memory has to be named.
    """
    text = str(error).lower()
    return "out of memory" in text or ("resource_exhausted" in text and "allocat" in text)


_QUOTED_LENGTH = 200


def nearest(name: str, valid: Iterable[str], otherwise: str = "") -> str:
    """Returns a suggestion for a misspelt `name`: the closest of `valid`, or else all of them.

    The result is a clause to append to an error message, such as `did you mean 'lr'?`. `otherwise`
    takes the place of the list where no name is close.
    """
    valid = sorted(map(str, valid))
    name, lowered = name[:_QUOTED_LENGTH], {one.lower(): one for one in valid}
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    close += difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0] if close[0] in valid else lowered[close[0]]!r}?"
    return otherwise or (f"valid: {', '.join(valid)}" if valid else "none is valid here")


def quoted(value: Any) -> str:
    """Returns a value as error messages show it: its `repr` on one line, cut where it is long."""
    try:
        text = " ".join(line.strip() for line in repr(value).splitlines())
    except (RecursionError, MemoryError, ValueError):
        text = f"a {type(value).__name__}"
    if len(text) <= _QUOTED_LENGTH:
        return text
    return f"{text[: _QUOTED_LENGTH - 20]}...{text[-10:]}"


def program() -> str:
    """Returns how the user called this program, for messages that tell what to type next.

    `run.sh`, which calls the program for the user, sets VIT_JAX_PROGRAM.
    """
    called = os.path.basename(sys.argv[0]).removesuffix(".exe")
    return os.environ.get("VIT_JAX_PROGRAM") or (
        called if called == "vit-jax" else "python -m vit_jax"
    )
