"""Split strings in the syntax of TFDS, for the sources that TFDS does not read."""

import re
from collections.abc import Sequence

import numpy as np

from vit_jax.errors import UserError

_SPLIT = re.compile(r"(?P<name>[\w.-]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """Parses `train[10%:90%]` into its name and the two bounds (None for an omitted bound)."""
    match = _SPLIT.fullmatch(split.strip())
    if not match:
        raise UserError(
            f"split {split!r} is not understood: write a name, or a part of one such as "
            "'train[:90%]' or 'train[1150:]'"
        )
    return match["name"], match["start"], match["stop"]


def split_range(split: str, num_examples: int) -> range:
    """Returns the record numbers that the brackets of `split` select from `num_examples` records.

    Percentages are rounded to the nearest whole record, as in TFDS, so `[:90%]` and `[90%:]` have
    no common records and together contain all of them. Negative bounds count from the end.
    """
    _, start, stop = parse_split(split)
    first = 0 if start is None else _bound(start, num_examples)
    last = num_examples if stop is None else _bound(stop, num_examples)
    if first >= last:
        raise UserError(f"split {split!r} selects none of {num_examples} examples")
    return range(first, last)


def inner_bounds(selected: range, num_examples: int) -> list[int]:
    """Returns the ends of `selected` that lie inside the list of examples and so divide it."""
    return [bound for bound in (selected.start, selected.stop) if 0 < bound < num_examples]


def with_every_class(labels: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """Returns an order of the examples in which the part before each bound has every class.

    If the first example of a class lies after a bound, it changes places with an example before the
    bound that is not the first of its own class. Nothing is moved if every class is before the
    bound already, or if there is no room for all classes. The choice of the examples that change
    places does not depend on the bounds. Adjacent parts therefore have no common examples, and
    together contain all examples.

    Args:
      labels: class numbers of the examples in their order, integers `[n]`.
      bounds: the positions at which the examples are divided, numbers between 0 and n.

    Returns:
      Numbers of the examples, int64 `[n]`.
    """
    order = np.arange(len(labels))
    firsts = np.sort(np.unique(labels, return_index=True)[1])
    others = np.setdiff1d(order, firsts)
    for late, early in zip(firsts[::-1], others, strict=False):
        if any(early < bound <= late for bound in bounds):
            order[[early, late]] = late, early
    return order


def _bound(text: str, num_examples: int) -> int:
    percent = text.endswith("%")
    bound = round(int(text[:-1]) * num_examples / 100) if percent else int(text)
    if bound < 0:
        bound += num_examples
    return min(max(bound, 0), num_examples)
