"""Split strings in the syntax of TFDS, and folds, for the sources that TFDS does not read.

    train                       all records of the split
    train[:90%], train[1000:]   a part of them, in their order
    train[fold 2 of 5]          the second of five folds
    train[all but fold 2 of 5]  the other four
    train[1% per class]         a hundredth of each class; train[25 per class]: 25 examples of each

Several parts apply one after another: `train[all but fold 1 of 10][1% per class]`. Folds and parts
of classes are drawn, as a function of a seed alone. Folds are stratified: each has the same share
of every class, up to one example. Where records belong to groups, such as the images of one
patient, folds never divide a group.
"""

import re
from collections.abc import Sequence

import numpy as np

from vit_jax.errors import UserError

_SPLIT = re.compile(r"(?P<name>[\w.-]*)(?P<parts>(?:\[[^][]*\])*)")
_RANGE = re.compile(r"(?P<start>-?\d{1,18}%?)?:(?P<stop>-?\d{1,18}%?)?")
_FOLD = re.compile(r"(?P<others>all but )?fold (?P<fold>\d{1,9}) of (?P<count>\d{1,9})")
_PER_CLASS = re.compile(r"(?P<amount>\d{1,18}(?:\.\d{1,18})?)(?P<percent>%?) per class")
_UINT64 = (1 << 64) - 1


def split_name(split: str) -> str:
    """Returns the name in `train[10%:90%]`. Raises `UserError` if the string is not understood."""
    return _parsed(split)[0]


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """Parses `train[10%:90%]` into its name and the two bounds (None for an omitted bound).

    Raises:
      UserError: the string is not understood, or has folds or parts of classes, which only sources
        with class labels have.
    """
    name, parts = _parsed(split)
    if not parts:
        return name, None, None
    match = _RANGE.fullmatch(parts[0])
    if not match or len(parts) > 1:
        raise UserError(
            f"split {split!r}: this source has no classes to draw folds from; write a part such as"
            " 'train[:90%]'"
        )
    return name, match["start"], match["stop"]


def split_range(split: str, num_examples: int) -> range:
    """Returns the record numbers that the brackets of `split` select from `num_examples` records.

    Percentages are rounded to the nearest whole record, as in TFDS, so `[:90%]` and `[90%:]` have
    no common records and together contain all of them. Negative bounds count from the end.
    """
    _, start, stop = parse_split(split)
    return _range(split, start, stop, num_examples)


def select(
    split: str,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    seed: int = 0,
    *,
    firsts: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the numbers of the records that the brackets of `split` select, int64, ascending.

    Args:
      labels: class numbers `[n]`, or several labels an example as ones and zeros `[n, classes]`;
        folds are then stratified by the rarest label of each example.
      groups: the number of the group of each example, integers `[n]`.
      seed: for folds and parts of classes.
      firsts: the number of the first example of the same image, int64 `[n]`; folds keep examples of
        one image together.

    Raises:
      UserError: the string is not understood, selects nothing, or would divide groups.
    """
    classes = labels if labels.ndim == 1 else _rarest(labels)
    chosen = np.arange(len(classes))
    for part in _parsed(split)[1]:
        of_groups, of_firsts = (x if x is None else x[chosen] for x in (groups, firsts))
        here = _part(split, part, classes[chosen], of_groups, firsts=of_firsts, seed=seed)
        chosen = chosen[here]
        if not len(chosen):
            raise UserError(f"split {split!r} selects none of {len(classes)} examples")
    return chosen


def select_unlabeled(split: str, num_examples: int, seed: int = 0) -> np.ndarray:
    """Returns `select` for examples without classes: folds are drawn from all of them alike.

    Raises:
      UserError: the string is not understood, selects nothing, or has parts of classes.
    """
    if any(_PER_CLASS.fullmatch(part) for part in _parsed(split)[1]):
        raise UserError(
            f"split {split!r}: this source has no classes to take a part of; write a part such as"
            " 'train[:1%]', or a fold"
        )
    if not num_examples:
        raise UserError(f"split {split!r} selects none of 0 examples")
    return select(split, np.zeros(num_examples, np.int64), seed=seed)


def drawn_and_read(split_seed: int = 0, exif: str = "apply") -> str:
    """Returns the end of a fingerprint: the seed of folds, and how images are turned.

    It is "" for the default of both, as earlier versions wrote it.
    """
    seed = f":seed{split_seed}" if split_seed else ""
    return seed + (":exif-ignored" if exif == "ignore" else "")


def select_with_every_class(
    split: str, labels: np.ndarray, groups: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Returns `select`, after `with_every_class` if the first bracket is a part such as `[:90%]`.

    The order of the result is then that of `with_every_class`.
    """
    parts = _parsed(split)[1]
    match = _RANGE.fullmatch(parts[0]) if parts else None
    if not match:
        return select(split, labels, groups, seed)
    whole = _range(split, match["start"], match["stop"], len(labels))
    order = with_every_class(labels, inner_bounds(whole, len(labels)))
    return order[select(split, labels[order], groups if groups is None else groups[order], seed)]


def _parsed(split: str) -> tuple[str, list[str]]:
    match = _SPLIT.fullmatch(split.strip())
    parts = re.findall(r"\[\s*(.*?)\s*\]", match["parts"]) if match else []
    if not match or not all(any(k.fullmatch(p) for k in _KINDS) for p in parts):
        raise UserError(
            f"split {split!r} is not understood: write a name, or a part of one such as"
            " 'train[:90%]', 'train[1150:]', 'train[fold 1 of 5]', 'train[all but fold 1 of 5]' or"
            " 'train[1% per class]'"
        )
    return match["name"], parts


_KINDS = (_RANGE, _FOLD, _PER_CLASS)


def _part(
    split: str,
    part: str,
    classes: np.ndarray,
    groups: np.ndarray | None,
    *,
    firsts: np.ndarray | None,
    seed: int,
) -> np.ndarray:
    """Returns the places that one bracket selects, ascending."""
    if match := _RANGE.fullmatch(part):
        if groups is not None:
            raise UserError(
                f"split {split!r} would divide groups of images; write a fold, such as"
                " 'train[fold 1 of 10]'"
            )
        places = _range(split, match["start"], match["stop"], len(classes))
        return np.arange(places.start, places.stop)
    if match := _FOLD.fullmatch(part):
        fold, count = int(match["fold"]), int(match["count"])
        if not 1 <= fold <= count or count < 2:
            raise UserError(f"split {split!r}: there is no fold {fold} of {count}, from 1 of 2 on")
        if count > len(classes):
            raise UserError(f"split {split!r}: {len(classes)} examples are too few for its folds")
        of_example = folds(classes, count, groups, seed)
        if firsts is not None:
            first, place = np.unique(firsts, return_index=True, return_inverse=True)[1:]
            of_example = of_example[first[place]]
        is_in = of_example == fold - 1
        return np.flatnonzero(~is_in if match["others"] else is_in)
    match = _PER_CLASS.fullmatch(part)
    assert match is not None
    amount, is_percent = float(match["amount"]), bool(match["percent"])
    if not amount or (is_percent and amount > 100) or not (is_percent or amount.is_integer()):
        raise UserError(
            f"split {split!r}: write a whole number from 1 on, or percent up to 100, such as"
            " 'train[25 per class]' or 'train[0.5% per class]'"
        )
    return per_class(classes, amount, is_percent=is_percent, seed=seed)


def folds(
    classes: np.ndarray, count: int, groups: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Returns the fold of each example, 0 to `count` - 1, int64 `[n]`, as a function of `seed`.

    Without groups, the examples of each class in random order are dealt to the folds in turns. With
    groups, the groups, the largest first, go where they keep the shares of all classes most even.
    """
    drawn = _random(seed).permutation(len(classes))
    found = np.empty(len(classes), np.int64)
    if groups is None:
        found[drawn[np.argsort(classes[drawn], kind="stable")]] = np.arange(len(classes)) % count
        return found
    classes = np.unique(classes, return_inverse=True)[1]
    groups = np.unique(groups, return_inverse=True)[1]
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    totals, held = np.bincount(classes), np.zeros((count, classes.max() + 1))
    sizes = np.array([len(rows) for rows in members])
    order = _random(seed).permutation(len(members))
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        rows = members[group]
        here, counts = np.unique(classes[rows], return_counts=True)
        # The sum of the squared shares is smallest where all folds have equal shares.
        costs = (held[:, here] * (counts / totals[here])).sum(1)
        fold = min(range(count), key=lambda f: (round(costs[f], 9), held[f].sum(), f))
        held[fold, here] += counts
        found[rows] = fold
    return found


def per_class(classes: np.ndarray, amount: float, *, is_percent: bool, seed: int = 0) -> np.ndarray:
    """Returns places of `amount` examples, or percent of them, of each class, ascending.

    Each class that there is keeps at least one. With the same seed, a smaller part lies inside a
    larger one.
    """
    drawn = _random(seed).permutation(len(classes))
    order = drawn[np.argsort(classes[drawn], kind="stable")]
    _, starts, counts = np.unique(classes[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    wanted = np.rint(counts * (amount / 100)) if is_percent else np.full(len(counts), amount)
    return np.sort(order[rank < np.repeat(np.maximum(wanted, 1), counts)])


def _random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed & _UINT64, 0]))


def _rarest(labels: np.ndarray) -> np.ndarray:
    """Returns the rarest label of each row of ones and zeros; -1 for a row without labels."""
    rarity = np.where(labels > 0, 1 / np.maximum((labels > 0).sum(0), 1), 0)
    return np.where(rarity.max(1) > 0, rarity.argmax(1), -1)


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


def _range(split: str, start: str | None, stop: str | None, num_examples: int) -> range:
    first = 0 if start is None else _bound(start, num_examples)
    last = num_examples if stop is None else _bound(stop, num_examples)
    if first >= last:
        raise UserError(f"split {split!r} selects none of {num_examples} examples")
    return range(first, last)


def _bound(text: str, num_examples: int) -> int:
    percent = text.endswith("%")
    bound = round(int(text[:-1]) * num_examples / 100) if percent else int(text)
    if bound < 0:
        bound += num_examples
    return min(max(bound, 0), num_examples)
