"""Masks of patches that are drawn inside a compiled step, by the rules of `vit_jax.augment.masks`.

All shapes are static. The masks of a batch depend on the key and on the place in the batch alone,
so that they are the same on any mesh.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.augment.masks import PATIENCE, TRIES, BlockRule, MultiBlockRule, num_masked_cells
from vit_jax.types import Array


def cell_masks(key: Array, batch: int, grid: tuple[int, int], cell: int, ratio: float) -> Array:
    """Returns SimMIM's masks, bool `[batch, *grid]`; see `masks.cell_mask`."""
    coarse = (batch, grid[0] // cell, grid[1] // cell)
    noise = jax.random.uniform(key, (batch, coarse[1] * coarse[2]))
    ranks = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    masked = (ranks < num_masked_cells(noise.shape[1], ratio)).reshape(coarse)
    return masked.repeat(cell, axis=1).repeat(cell, axis=2)


def block_masks(
    key: Array,
    num_crops: int,
    rule: BlockRule,
    *,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> Array:
    """Returns DINOv2's masks, bool `[num_crops, rows * columns]`; see `masks.batch_block_masks`."""
    count = int(num_crops * probability)
    share_key, order_key, block_key = jax.random.split(key, 3)
    parts = (jnp.arange(count) + jax.random.uniform(share_key, (count,))) / max(count, 1)
    patches = rule.rows * rule.columns
    requests = jnp.floor(patches * (ratio[0] + parts * (ratio[1] - ratio[0]))).astype(jnp.int32)
    requests = jnp.concatenate([requests, jnp.zeros(num_crops - count, jnp.int32)])
    requests = jax.random.permutation(order_key, requests)
    keys = jax.random.split(block_key, num_crops)
    masks = jax.vmap(lambda key, count: _blocks(key, count, rule))(keys, requests)
    return masks.reshape(num_crops, patches)


def _blocks(key: Array, count: Array, rule: BlockRule) -> Array:
    """Returns a mask bool `[rows, columns]` of at most `count` patches."""
    log_aspect = -math.log(rule.min_aspect)
    most = math.inf if rule.max_patches is None else rule.max_patches

    def goes_on(state: tuple) -> Array:
        mask, failures, _ = state
        return (mask.sum() < count) & (failures < TRIES)

    def try_block(state: tuple) -> tuple:
        mask, failures, number = state
        u = jax.random.uniform(jax.random.fold_in(key, number), (4,))
        room = jnp.minimum((count - mask.sum()).astype(jnp.float32), most)
        area = rule.min_patches + u[0] * (room - rule.min_patches)
        aspect = jnp.exp((2 * u[1] - 1) * log_aspect)
        size = _rounded(area * aspect), _rounded(area / aspect)
        fits = (size[0] < rule.rows) & (size[1] < rule.columns)
        corner = _below(u[2], rule.rows - size[0] + 1), _below(u[3], rule.columns - size[1] + 1)
        block = _rectangle((rule.rows, rule.columns), corner, size)
        added = (block & ~mask).sum()
        accepted = fits & (added > 0) & (added <= room)
        return mask | (block & accepted), jnp.where(accepted, 0, failures + 1), number + 1

    empty = jnp.zeros((rule.rows, rule.columns), bool)
    return jax.lax.while_loop(goes_on, try_block, (empty, 0, 0))[0]


class Patches(NamedTuple):
    """Patches of each image, in buffers of static size.

    numbers: int32 `[batch, blocks, n]`, in ascending order. counts: bool, of the same shape, False
    where the buffer is longer than the block.
    """

    numbers: Array
    counts: Array


def multi_block_masks(
    key: Array, batch: int, rule: MultiBlockRule, context_size: int, groups: int = 1
) -> tuple[Patches, Patches]:
    """Returns the contexts and the targets of I-JEPA; see `masks.MultiBlockRule`.

    context_size: the size of the buffer of a context's patches; longer contexts are cut.
    groups: the number of equal parts of the batch, each of which has blocks of one length.
    """
    size_key, image_key = jax.random.split(key)
    sizes = jax.random.uniform(size_key, (2,))
    target = _block_size(rule, sizes[0], rule.target_scale, rule.target_aspect)
    context = _block_size(rule, sizes[1], rule.context_scale, (1.0, 1.0))

    def one(key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, rule.num_targets + rule.num_contexts)
        nothing = jnp.zeros((0, rule.rows, rule.columns), bool)
        draw = jax.vmap(lambda key, size, avoided: _block(key, size, avoided, rule),
                        in_axes=(0, None, None))  # fmt: skip
        targets = draw(keys[: rule.num_targets], target, nothing)
        avoided = nothing if rule.overlap else targets
        return draw(keys[rule.num_targets :], context, avoided), targets

    contexts, targets = jax.vmap(one)(jax.random.split(image_key, batch))
    return (
        _numbered(contexts, context_size, groups),
        _numbered(targets, most_target_patches(rule), groups),
    )


def most_target_patches(rule: MultiBlockRule) -> int:
    """Returns the most patches that a target block may have."""
    return max(math.prod(rule.target_size(u)) for u in np.linspace(0.0, 1.0, 2001))


def most_context_patches(rule: MultiBlockRule) -> int:
    """Returns the most patches that a context block may have, without regard to targets."""
    return max(math.prod(rule.context_size(u)) for u in np.linspace(0.0, 1.0, 2001))


def _block_size(
    rule: MultiBlockRule, u: Array, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[Array, Array]:
    area = jnp.floor(rule.rows * rule.columns * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height, width = _rounded(area * ratio), _rounded(area / ratio)
    return jnp.minimum(height, rule.rows - 1), jnp.minimum(width, rule.columns - 1)


def _block(key: Array, size: tuple[Array, Array], avoided: Array, rule: MultiBlockRule) -> Array:
    """Returns a block bool `[rows, columns]` without those in `avoided` `[n, rows, columns]`."""
    most = PATIENCE * (len(avoided) + 1)

    def goes_on(state: tuple) -> Array:
        block, failures = state
        return (block.sum() <= rule.min_keep) & (failures < most)

    def try_block(state: tuple) -> tuple:
        _, failures = state
        u = jax.random.uniform(jax.random.fold_in(key, failures), (2,))
        corner = _below(u[0], rule.rows - size[0]), _below(u[1], rule.columns - size[1])
        block = _rectangle((rule.rows, rule.columns), corner, size)
        is_avoided = jnp.arange(len(avoided)) < len(avoided) - failures // PATIENCE
        block &= ~(avoided & is_avoided[:, None, None]).any(0)
        return block, failures + 1

    empty = jnp.zeros((rule.rows, rule.columns), bool)
    return jax.lax.while_loop(goes_on, try_block, (empty, 0))[0]


def _numbered(blocks: Array, size: int, groups: int) -> Patches:
    """Returns the patches of blocks `[batch, n, rows, columns]`, cut to their group's shortest."""
    flat = blocks.reshape(*blocks.shape[:2], -1)
    shortest = flat.sum(-1).reshape(groups, -1).min(1)
    shortest = jnp.repeat(shortest, len(blocks) // groups)[:, None, None]
    numbers = jnp.argsort(~flat, axis=-1, stable=True)[..., :size].astype(jnp.int32)
    counts = jnp.arange(size)[None, None] < shortest
    return Patches(numbers, jnp.broadcast_to(counts, numbers.shape))


def _rectangle(grid: tuple[int, int], corner: tuple[Array, Array], size: tuple) -> Array:
    inside = [
        (jnp.arange(n) >= first) & (jnp.arange(n) < first + length)
        for n, first, length in zip(grid, corner, size, strict=True)
    ]
    return inside[0][:, None] & inside[1][None]


def _rounded(square: Array) -> Array:
    return jnp.round(jnp.sqrt(square)).astype(jnp.int32)


def _below(u: Array, high: Array) -> Array:
    """Returns a whole number from 0 to below `high`, for `u` in 0..1."""
    return jnp.minimum(jnp.floor(u * high).astype(jnp.int32), jnp.maximum(high - 1, 0))
