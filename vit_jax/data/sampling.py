"""The examples and augmentation keys of the training stream, in NumPy alone.

The stream is numbered by 64-bit positions: row `r` of step `s` is position `s * batch_size + r`.
Epoch `e` covers positions `e * n` to `(e + 1) * n - 1` in an order of its own. Everything here is a
pure function of (seed, position), so a batch does not depend on processes, threads, or restarts.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

_UINT64 = (1 << 64) - 1


class BlockShuffle(NamedTuple):
    """An order for stores where one read costs much more than one record (`gs://`, `s3://`).

    Records lie in consecutive blocks (for example files) that are read whole. An epoch permutes the
    blocks and divides the result into `groups` equal parts, one for each group of consecutive rows
    of the global batch. Processes hold different rows, so they read different blocks. Within its
    part, a record is shuffled inside a window of blocks: a reader that keeps a window of each part
    in memory fetches every block about once per epoch.
    """

    lengths: tuple[int, ...]
    """The number of records in each block."""
    window: int = 2
    """The number of blocks within which the records of a part are shuffled."""
    groups: int = 8

    @property
    def num_examples(self) -> int:
        return sum(self.lengths)


def epoch_permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns the order of one epoch: int64 `[num_examples]`, each example once.

    Philox is counter-based, so epochs are independent streams of one key. Permuting the
    1,281,167 examples of ImageNet takes tens of milliseconds.
    """
    return _epoch_random(seed, epoch).permutation(num_examples)


def block_permutation(seed: int, epoch: int, blocks: BlockShuffle) -> np.ndarray:
    """Returns the order of one epoch under `blocks`: int64 `[groups, num_examples // groups]`.

    The remainder of the division by the number of groups is omitted. The omitted examples differ
    between epochs.
    """
    random = _epoch_random(seed, epoch)
    starts = np.cumsum([0, *blocks.lengths])
    drawn = random.permutation(len(blocks.lengths)).tolist()
    order = np.concatenate([np.arange(starts[block], starts[block + 1]) for block in drawn])
    part = len(order) // blocks.groups
    order = order[: part * blocks.groups].reshape(blocks.groups, part)
    width = blocks.window * max(blocks.lengths)
    for group, records in enumerate(order):
        # The windows of the groups end at different times, which spreads the reads.
        for first in range(-(group * width // blocks.groups), part, width):
            random.shuffle(records[max(first, 0) : first + width])
    return order


def _epoch_random(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed & _UINT64, epoch]))


# The cache holds the current epoch and the next, because a batch may contain examples of both.
@functools.lru_cache(maxsize=2)
def _cached_order(seed: int, epoch: int, num_examples: int | BlockShuffle) -> np.ndarray:
    if isinstance(num_examples, BlockShuffle):
        order = block_permutation(seed, epoch, num_examples)
    else:
        order = epoch_permutation(seed, epoch, num_examples)
    order.setflags(write=False)
    return order


def train_positions(step: int, batch_size: int) -> np.ndarray:
    """Returns the stream positions of the global batch of `step`: int64 `[batch_size]`."""
    return np.int64(step) * batch_size + np.arange(batch_size, dtype=np.int64)


def example_at(
    positions: np.ndarray, num_examples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples at `positions` and the epochs of the positions, both int64 `[k]`."""
    epochs, offsets = np.divmod(np.asarray(positions, np.int64), num_examples)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = _cached_order(seed, epoch, num_examples)[offsets[here]]
    return indices, epochs


def example_in_blocks(
    positions: np.ndarray, batch_size: int, seed: int, blocks: BlockShuffle
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the same as `example_at`, in the order of `blocks`, for batches of `batch_size`."""
    # All groups need the same number of rows, and enough examples to fill them.
    groups = math.gcd(blocks.groups, batch_size)
    blocks = blocks._replace(groups=groups if groups <= blocks.num_examples else 1)
    rows = batch_size // blocks.groups
    steps, row = np.divmod(np.asarray(positions, np.int64), batch_size)
    group, row = np.divmod(row, rows)
    epochs, offsets = np.divmod(steps * rows + row, blocks.num_examples // blocks.groups)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = _cached_order(seed, epoch, blocks)[group[here], offsets[here]]
    return indices, epochs


def repeated_positions(positions: np.ndarray, batch_size: int, repeats: int) -> np.ndarray:
    """Returns the positions of the examples if each appears `repeats` times in its batch.

    This is repeated augmentation (Hoffer et al., 2020; used by DeiT): the copies of an example are
    in one batch and differ in their augmentation, whose keys still depend on `positions`. The
    copies are `batch_size / repeats` rows apart, so mixing neighbors never mixes an image with
    itself. If that is not a whole number, the last examples appear one time less.
    """
    if repeats == 1:
        return positions
    steps, rows = np.divmod(positions, batch_size)
    distinct = -(-batch_size // repeats)
    return steps * distinct + rows % distinct


def replacement(position: int, attempt: int, num_examples: int, seed: int) -> int:
    """Returns the example for `position` after `attempt` (from 1) unreadable examples."""
    draw = _mix(np.uint64(position) ^ _mix(np.uint64(seed & _UINT64)), attempt)
    return int(draw[0]) % num_examples


def augment_seeds(seed: int, positions: np.ndarray) -> np.ndarray:
    """Returns keys for the augmentation of examples: int32 `[k, 2]`, for `tf.image.stateless_*`.

    For each seed, the key is a bijection of the 64-bit position: no two positions share a key.
    """
    keys = _mix(np.asarray(positions, np.int64).view(np.uint64) ^ _mix(np.uint64(seed & _UINT64)))
    return keys.view(np.int32).reshape(-1, 2)


def _mix(values: np.ndarray | np.uint64, stream: int = 0) -> np.ndarray:
    """Applies the output function of SplitMix64 (Steele et al., 2014), a bijection of 64 bits."""
    z = np.atleast_1d(np.asarray(values, np.uint64)) + np.uint64(
        0x9E3779B97F4A7C15 * (stream + 1) & _UINT64
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
