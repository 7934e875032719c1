"""The names of classes, compared between a run and the data that it is given later."""

import unicodedata
from collections.abc import Sequence
from typing import Any


def class_names(task: Any) -> tuple[str, ...]:
    """Returns the names of a task's classes: its own, or else those of the data; may be empty."""
    return tuple(getattr(task, "class_names", ()) or task.info.class_names or ())


def difference(before: Sequence[str], after: Sequence[str]) -> str:
    """Returns the first difference between two lists of class names, or "" if there is none.

    Unicode has two forms of letters such as é, and file systems differ in which they return.
    """
    for number, (old, new) in enumerate(zip(before, after, strict=False)):
        if plain(old) != plain(new):
            return f"class {number} was {old!r} and is now {new!r}"
    if len(before) != len(after):
        return f"there were {len(before)} classes and are now {len(after)}"
    return ""


def plain(name: str) -> str:
    """Returns a name in the form of Unicode in which equal names are equal."""
    return unicodedata.normalize("NFC", name)
