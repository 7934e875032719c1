"""Resizing of patch kernels and position tables, shared by FlexiViT and checkpoint surgery."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.types import Array, Numbers


def linear_weights(place: Numbers, old: int, new: Numbers) -> Numbers:
    """Rows of a linear, antialiased resize matrix with half-pixel centres: `[..., old]`.

    place: index of the pixel in the new line, `[...]`. new: length of that line, `[...]`. Works on
    NumPy and (traced) JAX arrays alike.
    """
    xp: Any = jnp if isinstance(place, jax.Array) else np
    scale = old / new
    centre = (place + 0.5) * scale - 0.5
    reach = xp.maximum(scale, 1.0)
    distance = xp.abs(xp.arange(old).reshape((1,) * centre.ndim + (old,)) - centre[..., None])
    weights = xp.maximum(0.0, 1.0 - distance / reach[..., None])
    return weights / weights.sum(axis=-1, keepdims=True)


@functools.lru_cache(maxsize=64)
def linear_resize_matrix(old: int, new: int) -> np.ndarray:
    """Returns the matrix `[new, old]` of a linear, antialiased resize with half-pixel centers."""
    return linear_weights(np.arange(new), old, np.full(new, new))


@functools.lru_cache(maxsize=64)
def cubic_resize_matrix(
    old: int, new: int, *, offset: float = 0.0, antialias: bool = False
) -> np.ndarray:
    """Returns the matrix `[new, old]` of a bicubic resize along one axis, with half-pixel centers.

    offset: added to `new` where places are computed, though not to the number of rows; DINO has 0.1
      (Caron et al. 2021), because its size is a ratio that must not be rounded down.
    antialias: False is PyTorch's `interpolate`: four taps with a = -0.75, edges repeated. True
      stretches the kernel, with a = -0.5, where the line shrinks, and cuts it off at the edges.
    """
    scale = old / (new + offset)
    places = (np.arange(new) + 0.5) * scale - 0.5
    if not antialias:
        return _four_taps(places, old)
    weights = _cubic(np.abs(np.arange(old)[None] - places[:, None]) / max(scale, 1.0), a=-0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _four_taps(places: np.ndarray, old: int) -> np.ndarray:
    """Returns weights `[new, old]` of the four neighbors of each place; edges are repeated."""
    first = np.floor(places).astype(int) - 1
    weights, rows = np.zeros((len(places), old)), np.arange(len(places))
    for tap in range(4):
        taken = np.clip(first + tap, 0, old - 1)
        weights[rows, taken] += _cubic(np.abs(places - (first + tap)), a=-0.75)
    return weights


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Returns Keys' cubic kernel."""
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@functools.lru_cache(maxsize=64)
def _pseudo_inverse(old: int, new: int) -> np.ndarray:
    return np.linalg.pinv(linear_resize_matrix(old, new).T)


def resize_patch_kernel(kernel: Numbers, patch: Sequence[int]) -> Numbers | Array:
    """Resizes a patch embedding kernel `[ph, pw, channels, width]` for patches of another size.

    With B the matrix of a bilinear resize, the new kernel is the least-squares solution of
    <B x, new> = <x, old> for all patches x: exact when patches grow, the best there is when they
    shrink (Beyer et al. 2023, FlexiViT, section 3.4). Bilinear resizing is separable, and so is its
    pseudo-inverse.
    """
    height, width = patch
    if (height, width) == tuple(kernel.shape[:2]):
        return kernel
    rows = _pseudo_inverse(kernel.shape[0], height).astype(np.float32)
    columns = _pseudo_inverse(kernel.shape[1], width).astype(np.float32)
    return jnp.einsum("ip,jq,pqcd->ijcd", rows, columns, kernel)


def resize_grid(table: Array | np.ndarray, grid: Sequence[int]) -> Array:
    """Resizes a position table `[rows, columns, width]` bilinearly (antialiased) to `grid`."""
    rows = linear_resize_matrix(table.shape[0], grid[0]).astype(np.float32)
    columns = linear_resize_matrix(table.shape[1], grid[1]).astype(np.float32)
    return jnp.einsum("ip,jq,pqd->ijd", rows, columns, table)


def resize_position_table(
    table: Numbers,
    old: Sequence[int],
    new: Sequence[int],
    *,
    offset: float = 0.0,
    antialias: bool = False,
) -> Numbers | Array:
    """Resizes learned positions `[1, rows * columns, width]` bicubically from one grid to another.

    (Caron et al. 2021, DINO; Oquab et al. 2023, DINOv2.) The table is returned as it is where the
    grids are equal; see `cubic_resize_matrix` for `offset` and `antialias`.
    """
    if tuple(old) == tuple(new):
        return table
    rows, columns = (
        cubic_resize_matrix(o, n, offset=offset, antialias=antialias).astype(np.float32)
        for o, n in zip(old, new, strict=True)
    )
    grid = jnp.einsum("ip,jq,pqd->ijd", rows, columns, table.reshape(*old, -1), precision="highest")
    return grid.reshape(1, new[0] * new[1], -1)
