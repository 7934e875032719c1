"""Resizing of patch kernels and position tables, shared by FlexiViT and checkpoint surgery."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.types import Array


def linear_weights(place: Array, old: int, new: Array) -> Array:
    """Rows of a linear, antialiased resize matrix with half-pixel centres: `[..., old]`.

    place: index of the pixel in the new line, `[...]`. new: length of that line, `[...]`. Works on
    NumPy and (traced) JAX arrays alike.
    """
    xp = jnp if isinstance(place, jax.Array) else np
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
def _pseudo_inverse(old: int, new: int) -> np.ndarray:
    return np.linalg.pinv(linear_resize_matrix(old, new).T)


def resize_patch_kernel(kernel: Array | np.ndarray, patch: Sequence[int]) -> Array:
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
