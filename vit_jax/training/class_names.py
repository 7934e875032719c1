"""The names of classes, compared wherever two sides meet: runs, data, checkpoints.

Labels are numbers. Two sides that number their classes differently would still give a metric, or a
head, which would have no meaning.
"""

import logging
import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol

from vit_jax.errors import UserError


class Labels(Protocol):
    """The meaning of labels: of a source of data, a `DataInfo`, or others."""

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str] | None: ...


def class_names(task: Any) -> tuple[str, ...]:
    """Returns the names of a task's classes: its own, or else those of the data; may be empty."""
    if not getattr(task, "learns_classes", True):
        return ()
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


def moved(names: Sequence[str], others: Sequence[str]) -> tuple[int, str, str] | None:
    """Returns the first class of `names` that `others` has under another number.

    The result is (number, its name in `names`, its name in `others`), or None. Names may differ
    otherwise: two sides may have different words for one class. A name that several classes have
    tells nothing where both sides give it the same number.
    """
    pairs = enumerate(zip(map(plain, names), map(plain, others), strict=False))
    rest = [(number, name, other) for number, (name, other) in pairs if name != other]
    ours, theirs = {name for _, name, _ in rest}, {other for _, _, other in rest}
    return next((pair for pair in rest if pair[1] in theirs or pair[2] in ours), None)


def check_labels(place: str, found: Labels, known_place: str, known: Labels) -> None:
    """Compares the classes of two sides whose labels are taken for the same.

    A class with another name is a warning, since two sides may have different words for it.

    Args:
      place, known_place: the names of both sides in messages.

    Raises:
      UserError: the sides have different numbers of classes, or one name has two numbers.
    """
    if found.num_classes and known.num_classes and found.num_classes != known.num_classes:
        raise UserError(
            f"{place} has {found.num_classes} classes, {known_place} has {known.num_classes};"
            " labels must mean the same in both"
        )
    names, others = found.class_names or (), known.class_names or ()
    if other := moved(names, others):
        raise UserError(
            f"{place} has classes of {known_place} in another order: class {other[0]} is"
            f" {other[1]!r}, in {known_place} {other[2]!r}; write them in one order"
        )
    warn_of_other_names(place, names, known_place, others)


def warn_of_other_names(
    place: str, names: Sequence[str], known_place: str, others: Sequence[str]
) -> None:
    """Warns of the first class that has another name in another place."""
    for number, (name, other) in enumerate(zip(names, others, strict=False)):
        if plain(name) != plain(other):
            logging.warning(
                "%s calls class %d %r, %s %r: is it the same?",
                place, number, name, known_place, other,
            )  # fmt: skip
            return


def plain(name: str) -> str:
    """Returns a name in the form of Unicode in which equal names are equal."""
    return unicodedata.normalize("NFC", name)
