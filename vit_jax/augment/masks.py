"""Masks of patches that are drawn on the host, by the rules of DINOv2, I-JEPA and SimMIM.

Each function is pure: it takes the source of its random numbers. `numbers_at(seed, position)` makes
one of a seed and a position of the stream; the masks of published code follow from the numbers that
it drew. `vit_jax.augment.device_masks` draws by the same rules inside a compiled step.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vit_jax.errors import UserError

TRIES = 10
"""The attempts that the block rule of BEiT makes for each block."""

PATIENCE = 20
"""The failures after which I-JEPA lets a context overlap one more target."""


def numbers_at(seed: int, position: int) -> random.Random:
    """Returns the random numbers that belong to a position of the stream, or to a step."""
    return random.Random((seed << 64) | position)


@dataclasses.dataclass(frozen=True)
class BlockRule:
    """Masks made of rectangles (Bao et al. 2022, BEiT, algorithm 1), as DINOv2 draws them.

    Attributes:
      rows, columns: the grid of patches.
      max_patches: the most patches that one block may add; None is the number that is to be masked.
      min_patches: the least area that is drawn for a block.
      min_aspect: the ratio of sides is drawn between this and 1 / this, evenly in its logarithm.
    """

    rows: int
    columns: int
    max_patches: float | None = None
    min_patches: int = 4
    min_aspect: float = 0.3

    def draw(self, count: int, numbers: random.Random) -> np.ndarray:
        """Returns a mask bool `[rows, columns]` of at most `count` patches.

        It has fewer where `TRIES` blocks in a row do not fit.
        """
        mask = np.zeros((self.rows, self.columns), bool)
        masked = 0
        while masked < count:
            left = count - masked
            room = left if self.max_patches is None else min(left, self.max_patches)
            added = self._add_block(mask, room, numbers)
            if not added:
                break
            masked += added
        return mask

    def _add_block(self, mask: np.ndarray, room: float, numbers: random.Random) -> int:
        """Adds a block of at most `room` new patches to `mask` and returns their number."""
        log_aspect = math.log(self.min_aspect), math.log(1 / self.min_aspect)
        for _ in range(TRIES):
            area = numbers.uniform(self.min_patches, room)
            aspect = math.exp(numbers.uniform(*log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.rows or width >= self.columns:
                continue
            top = numbers.randint(0, self.rows - height)
            left = numbers.randint(0, self.columns - width)
            block = mask[top : top + height, left : left + width]
            added = height * width - int(block.sum())
            if 0 < added <= room:
                block[:] = True
                return added
        return 0


def batch_block_masks(
    rule: BlockRule,
    num_crops: int,
    numbers: random.Random,
    *,
    probability: float = 0.5,
    ratio: Sequence[float] = (0.1, 0.5),
) -> np.ndarray:
    """Returns the masks of a batch of global crops, bool `[num_crops, rows * columns]`.

    int(num_crops · probability) crops have a mask, in random places of the batch. Their shares of
    masked patches are spread over `ratio`: one from each of as many parts of equal width (Oquab et
    al. 2023, DINOv2).
    """
    patches = rule.rows * rule.columns
    shares = _masked_shares(num_crops, probability, ratio)
    masks = []
    for low, high in itertools.pairwise(shares):
        share = low + (high - low) * np.float32(numbers.random())
        masks.append(rule.draw(int(np.float32(patches) * share), numbers))
    masks += [rule.draw(0, numbers)] * (num_crops - len(masks))
    numbers.shuffle(masks)
    return np.stack(masks).reshape(num_crops, patches)


def most_masked(
    rule: BlockRule,
    num_crops: int,
    *,
    probability: float = 0.5,
    ratio: Sequence[float] = (0.1, 0.5),
) -> int:
    """Returns the most patches that `batch_block_masks` masks in all crops together.

    It is the static size of a buffer of masked patches.
    """
    shares = _masked_shares(num_crops, probability, ratio)[1:]
    return sum(int(np.float32(rule.rows * rule.columns) * share) for share in shares)


def _masked_shares(num_crops: int, probability: float, ratio: Sequence[float]) -> np.ndarray:
    """Returns the borders of the shares of masked crops, float32 `[masked crops + 1]`."""
    count = int(num_crops * probability)
    low, high = map(np.float32, ratio)
    if not count:
        return np.array([low])
    # As PyTorch spaces them in float32: from both ends towards the middle.
    step, i = (high - low) / np.float32(count), np.arange(count + 1, dtype=np.float32)
    return np.where(i < (count + 1) // 2, low + step * i, high - step * (count - i))


def masked_places(masks: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers int32 `[size]` of masked patches of a batch, and their weights.

    Patches are numbered along the flattened `[crops, patches]`. A patch weighs 1 / (masked patches
    of its crop), float32; the rest of the buffer has number 0 and weight 0.

    Raises:
      ValueError: more than `size` patches are masked.
    """
    found = np.flatnonzero(masks)
    if len(found) > size:
        raise ValueError(f"{len(found)} patches are masked; the buffer holds {size}")
    weights = masks / np.maximum(masks.sum(-1, keepdims=True), 1)
    missing = (0, size - len(found))
    places = np.pad(found, missing).astype(np.int32)
    return places, np.pad(weights.reshape(-1)[found], missing).astype(np.float32)


class ContextAndTargets(NamedTuple):
    """The patches of a batch that I-JEPA encodes, and those that it predicts.

    context: int32 `[contexts, batch, n]`. targets: int32 `[targets, batch, m]`. Both are numbers of
    patches in ascending order.
    """

    context: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class MultiBlockRule:
    """Target blocks, and context blocks without the targets (Assran et al. 2023, I-JEPA).

    Attributes:
      rows, columns: the grid of patches.
      num_targets, num_contexts: blocks of each kind, of every image.
      target_scale, context_scale: the range of a block's share of the patches.
      target_aspect: the range of (height / width) of targets; contexts are square.
      min_keep: a block has more patches than this.
      overlap: whether a context may contain patches of targets.
    """

    rows: int
    columns: int
    num_targets: int = 4
    num_contexts: int = 1
    target_scale: tuple[float, float] = (0.15, 0.2)
    context_scale: tuple[float, float] = (0.85, 1.0)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    min_keep: int = 10
    overlap: bool = False

    def target_size(self, u: float) -> tuple[int, int]:
        """Returns (height, width) of target blocks for `u` in 0..1, which sets area and aspect."""
        return self._size(u, self.target_scale, self.target_aspect)

    def context_size(self, u: float) -> tuple[int, int]:
        """Returns (height, width) of context blocks for `u` in 0..1."""
        return self._size(u, self.context_scale, (1.0, 1.0))

    def _size(self, u: float, scale: Sequence[float], aspect: Sequence[float]) -> tuple[int, int]:
        area = int(self.rows * self.columns * (scale[0] + u * (scale[1] - scale[0])))
        ratio = aspect[0] + u * (aspect[1] - aspect[0])
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return min(height, self.rows - 1), min(width, self.columns - 1)

    def draw(
        self, batch: int, uniforms: Sequence[float], below: Callable[[int], int]
    ) -> ContextAndTargets:
        """Returns the blocks of a batch, cut to the length of its shortest block of each kind.

        Args:
          batch: the number of images.
          uniforms: two numbers in 0..1, which set the sizes of all target and context blocks.
          below: returns a random whole number from 0 to below its argument; it is called for the
            top and the left of each block that is tried.

        Raises:
          UserError: target blocks are too small for `min_keep`.
        """
        target, context = self.target_size(uniforms[0]), self.context_size(uniforms[1])
        if math.prod(target) <= self.min_keep or math.prod(context) <= self.min_keep:
            raise UserError(
                f"blocks of {target[0]}x{target[1]} and {context[0]}x{context[1]} patches have no"
                f" more than min_keep={self.min_keep}; write a smaller number or larger blocks"
            )
        targets, contexts = [], []
        for _ in range(batch):
            own = [self._block(target, [], below) for _ in range(self.num_targets)]
            avoided = [] if self.overlap else own
            targets.append(own)
            contexts.append(
                [self._block(context, avoided, below) for _ in range(self.num_contexts)]
            )
        return ContextAndTargets(_cut(contexts), _cut(targets))

    def _block(
        self, size: Sequence[int], avoided: Sequence[np.ndarray], below: Callable[[int], int]
    ) -> np.ndarray:
        """Returns a block bool `[rows, columns]` without the blocks in `avoided`.

        After every `PATIENCE` blocks that are too small, one block less is avoided. The last row
        and the last column are never used, as in the published code.
        """
        failures = 0
        while True:
            top, left = below(self.rows - size[0]), below(self.columns - size[1])
            block = np.zeros((self.rows, self.columns), bool)
            block[top : top + size[0], left : left + size[1]] = True
            for other in avoided[: max(len(avoided) - failures // PATIENCE, 0)]:
                block &= ~other
            if block.sum() > self.min_keep:
                return block
            failures += 1


def _cut(blocks: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Returns the patches of blocks [image][block] as int32 `[block, image, n]`."""
    places = [[np.flatnonzero(block) for block in own] for own in blocks]
    shortest = min(len(found) for own in places for found in own)
    cut = [[found[:shortest] for found in own] for own in places]
    return np.swapaxes(np.array(cut, np.int32), 0, 1)


def num_masked_cells(cells: int, ratio: float) -> int:
    """Returns the number of `cells` that SimMIM masks: the share `ratio`, rounded up."""
    return math.ceil(cells * ratio)


def cell_mask(
    permutation: np.ndarray, rows: int, columns: int, cell: int, ratio: float
) -> np.ndarray:
    """Returns SimMIM's mask of patches, bool `[rows, columns]` (Xie et al. 2022, section 3.2).

    Args:
      permutation: of the cells, numbered row by row; the first `num_masked_cells` are masked.
      rows, columns: the grid of patches, which `cell` divides.
      cell: the side of a square of patches that are masked together.
      ratio: the share of masked cells.
    """
    masked = np.zeros(len(permutation), bool)
    masked[permutation[: num_masked_cells(len(permutation), ratio)]] = True
    coarse = masked.reshape(rows // cell, columns // cell)
    return coarse.repeat(cell, axis=0).repeat(cell, axis=1)
