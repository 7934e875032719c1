"""Which example, and which augmentation, at which place of the training stream. NumPy only.

The stream is numbered by 64-bit positions: row `r` of step `s` is position `s * batch_size + r`.
Epoch `e` covers positions `e * n` to `(e + 1) * n - 1` in an order of its own. Everything here is a
pure function of (seed, position), which is what makes a batch independent of processes, threads
and restarts.
"""

import functools
from typing import NamedTuple

import numpy as np

_UINT64 = (1 << 64) - 1


class BlockShuffle(NamedTuple):
    """Shuffling for stores where one read costs much more than one record (`gs://`, `s3://`).

    Blocks of `block_size` consecutive records are permuted, then records are shuffled within each
    `window` blocks. A reader that keeps one window in memory fetches every block once an epoch.
    """

    block_size: int = 256
    window: int = 64


def epoch_permutation(
    seed: int, epoch: int, num_examples: int, blocks: BlockShuffle | None = None
) -> np.ndarray:
    """The order of one epoch: int64 `[num_examples]`, each example once.

    Philox is counter-based, so that epochs are independent streams of one key; permuting the
    1,281,167 examples of ImageNet takes tens of milliseconds.
    """
    random = np.random.Generator(np.random.Philox(key=[seed & _UINT64, epoch]))
    if blocks is None:
        return random.permutation(num_examples)
    num_blocks = -(-num_examples // blocks.block_size)
    starts = random.permutation(num_blocks) * blocks.block_size
    within = np.arange(blocks.block_size)
    windows = []
    for first in range(0, num_blocks, blocks.window):
        records = (starts[first : first + blocks.window, None] + within).ravel()
        windows.append(random.permutation(records[records < num_examples]))
    return np.concatenate(windows)


# The current epoch and the next: a batch may straddle both.
@functools.lru_cache(maxsize=2)
def _cached_permutation(
    seed: int, epoch: int, num_examples: int, blocks: BlockShuffle | None
) -> np.ndarray:
    order = epoch_permutation(seed, epoch, num_examples, blocks)
    order.setflags(write=False)
    return order


def train_positions(step: int, batch_size: int) -> np.ndarray:
    """Stream positions of the global batch of `step`: int64 `[batch_size]`."""
    return np.int64(step) * batch_size + np.arange(batch_size, dtype=np.int64)


def example_at(
    positions: np.ndarray, num_examples: int, seed: int, blocks: BlockShuffle | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The examples at `positions` and the epochs they belong to, both int64 `[k]`."""
    epochs, offsets = np.divmod(np.asarray(positions, np.int64), num_examples)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = _cached_permutation(seed, epoch, num_examples, blocks)[offsets[here]]
    return indices, epochs


def repeated_positions(positions: np.ndarray, batch_size: int, repeats: int) -> np.ndarray:
    """Positions to draw examples at when each is to appear `repeats` times in its batch.

    Repeated augmentation (Hoffer et al., 2020; used by DeiT): copies of an example share a batch
    and differ in augmentation, which stays keyed by `positions`. The copies lie
    `batch_size / repeats` rows apart, so that mixing neighbours never mixes an image with itself.
    """
    if repeats == 1:
        return positions
    steps, rows = np.divmod(positions, batch_size)
    distinct = batch_size // repeats
    return steps * distinct + rows % distinct


def replacement(position: int, attempt: int, num_examples: int, seed: int) -> int:
    """The example to use at `position` after `attempt` (from 1) examples there were unreadable."""
    draw = _mix(np.uint64(position) ^ _mix(np.uint64(seed & _UINT64)), attempt)
    return int(draw[0]) % num_examples


def augment_seeds(seed: int, positions: np.ndarray) -> np.ndarray:
    """Keys for per-example augmentation: int32 `[k, 2]`, as `tf.image.stateless_*` take them.

    A bijection of the 64-bit position for each seed: no two positions share a key.
    """
    keys = _mix(np.asarray(positions, np.int64).view(np.uint64) ^ _mix(np.uint64(seed & _UINT64)))
    return keys.view(np.int32).reshape(-1, 2)


def _mix(values: np.ndarray | np.uint64, stream: int = 0) -> np.ndarray:
    """SplitMix64's output function (Steele et al., 2014): a bijection of 64-bit numbers."""
    z = np.atleast_1d(np.asarray(values, np.uint64)) + np.uint64(
        0x9E3779B97F4A7C15 * (stream + 1) & _UINT64
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
