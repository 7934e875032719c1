"""Repeats the examples of rare classes, as a function of a seed."""

from typing import TypeVar, cast

import numpy as np

from vit_jax.data.sampling import BlockShuffle
from vit_jax.data.sources import Described, Labeled, Records, Source
from vit_jax.errors import UserError

Given = TypeVar("Given", bound=Described)
_UINT64 = (1 << 64) - 1


def balanced(source: Given, balance: float, seed: int) -> Given | Source:
    """Returns a source in which classes occur more alike; the source itself if `balance` is 0.

    Every example occurs, those of rare classes several times (repeat factor sampling, Gupta et al.
    2019, LVIS, section 4): the examples of a class with n of them occur (n_max / n)^balance times
    each, on average. With 1, all classes are equally frequent.

    Raises:
      UserError: the source does not know its labels.
    """
    if not balance:
        return source
    labels = getattr(source, "labels", None)
    if labels is None:
        raise UserError(
            f"config.data.balance={balance}: this source does not know its labels before it reads"
            " images; folder, table, webdataset, idx and npz do, and tfds with"
            " config.data.args.count_labels=true"
        )
    return _Balanced(cast(Labeled, source), copies(labels, balance, seed), balance)


def copies(labels: np.ndarray, balance: float, seed: int) -> np.ndarray:
    """Returns how often each example occurs, int64 `[n]`, each at least once.

    Args:
      labels: class numbers `[n]`, or ones and zeros `[n, classes]`; the rarest label of an example
        counts.
    """
    if labels.ndim > 1:
        counts = np.maximum((labels > 0).sum(0), 1)
        factors = (counts.max() / counts) ** balance
        found = np.where(labels > 0, factors, 1.0).max(1)
        classes = np.where(labels > 0, factors, 0.0).argmax(1)
    else:
        classes, counts = np.unique(labels, return_inverse=True, return_counts=True)[1:]
        found = ((counts.max() / counts) ** balance)[classes]
    # Class by class, the running sum of the factors is rounded, so that the sums are exact.
    drawn = np.random.Generator(np.random.Philox(key=[seed & _UINT64, 1])).permutation(len(labels))
    order = drawn[np.argsort(classes[drawn], kind="stable")]
    ends = np.floor(np.cumsum(found[order]) + 0.5)
    result = np.empty(len(labels), np.int64)
    result[order] = np.diff(ends, prepend=0)
    return np.maximum(result, 1)


class _Balanced:
    """A source whose records occur several times."""

    def __init__(self, source: Labeled, repeated: np.ndarray, balance: float):
        self._source = source
        self._numbers = np.repeat(np.arange(len(source)), repeated)
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.fingerprint = f"{source.fingerprint}:balance{balance:g}"
        self.labels = source.labels[self._numbers]
        blocks = getattr(source, "blocks", None)
        self.blocks = blocks
        if blocks:
            starts = np.cumsum([0, *blocks.lengths[:-1]])
            lengths = tuple(np.add.reduceat(repeated, starts).tolist())
            self.blocks = BlockShuffle(lengths, blocks.window, blocks.groups)

    def __len__(self) -> int:
        return len(self._numbers)

    def fetch(self, indices: np.ndarray) -> Records:
        return self._source.fetch(self._numbers[indices])

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._numbers[index]))
