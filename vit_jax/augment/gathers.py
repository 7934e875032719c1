"""Functions that count, look up, and move pixels by gathers and scatters, or by matrix products.

On TPUs, gathers and scatters are slow and matrix products are fast; on other devices the opposite
is true. Products of pixel values in bfloat16 with ones and zeros are exact, so both give the same
bits.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.augment.strengths import FILL
from vit_jax.types import Array


def product(numbers: Array | np.ndarray, factor: Array | np.ndarray | np.float32) -> Array:
    """Returns a separately rounded product: the minimum prevents its fusion with a sum."""
    return jnp.minimum(numbers * factor, 2.0**24)


def count(images: Array) -> Array:
    """Returns how often each value occurs in each channel, int32 `[b, 256, c]`."""
    return jax.lax.platform_dependent(images, tpu=_count_by_products, default=_count)


def _count(images: Array) -> Array:
    def of_channel(values: Array) -> Array:
        return jnp.zeros(256, jnp.int32).at[values].add(1)

    flat = images.reshape(len(images), -1, images.shape[-1])
    return jax.vmap(jax.vmap(of_channel, 1, 1))(flat.astype(jnp.int32))


def _count_by_products(images: Array) -> Array:
    high, low = _digits(images)
    counts = jnp.einsum("bpch,bpcl->bhlc", high, low, preferred_element_type=jnp.float32)
    return counts.reshape(len(images), 256, -1).astype(jnp.int32)


def look_up(tables: Array, images: Array) -> Array:
    """Returns the entry of `tables`, uint8 `[b, 256, c]`, for each value, uint8 `[b, h, w, c]`."""
    return jax.lax.platform_dependent(tables, images, tpu=_look_up_by_products, default=_look_up)


def _look_up(tables: Array, images: Array) -> Array:
    flat = images.reshape(len(images), -1, images.shape[-1])
    return jnp.take_along_axis(tables, flat.astype(jnp.int32), 1).reshape(images.shape)


def _look_up_by_products(tables: Array, images: Array) -> Array:
    high, low = _digits(images)
    tables = tables.reshape(len(tables), 16, 16, -1).astype(jnp.bfloat16)
    rows = jnp.einsum("bpch,bhlc->bpcl", high, tables)
    return (rows * low).sum(-1).astype(jnp.uint8).reshape(images.shape)


def _digits(images: Array) -> tuple[Array, Array]:
    """Returns both hexadecimal digits of each value, one-hot, bfloat16 `[b, h w, c, 16]` each."""
    flat = images.reshape(len(images), -1, images.shape[-1])
    high, low = (jax.nn.one_hot(digit, 16, dtype=jnp.bfloat16) for digit in (flat >> 4, flat & 15))
    return high, low


MOST_PHASES = 8
"""The most phases for which `warp` uses products; each costs an image of memory."""


def warp(images: Array, moves: Array, phases: int) -> Array:
    """Returns images transformed by their matrices, read at the nearest pixel; `FILL` outside.

    Args:
      images: uint8 `[b, h, w, c]`.
      moves: the matrices, float32 `[b, 2, 3]`: the output pixel (x, y) is read at
        `matrix @ (x, y, 1)` of the input.
      phases: `num_phases` of all matrices that may occur.
    """
    height, width = images.shape[1:3]
    y, x = (grid[None].astype(jnp.float32) for grid in jnp.mgrid[:height, :width])
    columns, rows = _sources(moves, x, y)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    read = jax.lax.platform_dependent(
        images,
        columns,
        rows,
        tpu=(lambda images, _, rows: _read_by_products(images, rows, moves, phases))
        if phases
        else _read,
        default=_read,
    )
    return jnp.where(inside[..., None], read, FILL)


def num_phases(matrices: np.ndarray) -> int:
    """Returns a bound on how many pixels of an output column read one row of the input.

    It is 0 near a rotation by 90 degrees, where a whole column reads one row.
    """
    steepest = matrices[..., 1, 1].min()
    return 1 + int(1 / steepest + 0.01) if steepest > 1 / MOST_PHASES else 0


def _sources(moves: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Returns the (columns, rows) that the output pixels (x, y) read, int32, shaped as x and y."""

    def along(axis: int) -> Array:
        by_x, by_y, offset = _as_factors(moves[:, axis], x.ndim)
        place = product(x, by_x) + product(y, by_y) + offset
        return jax.lax.round(place, jax.lax.RoundingMethod.AWAY_FROM_ZERO).astype(jnp.int32)

    return along(0), along(1)


def _as_factors(numbers: Array, ndim: int) -> tuple[Array, ...]:
    """Returns the columns of `[b, n]`, each shaped to multiply arrays `[b, …]` of `ndim` axes."""
    return tuple(jnp.expand_dims(numbers, range(2, 1 + ndim)).swapaxes(0, 1))


def _read(images: Array, columns: Array, rows: Array) -> Array:
    """Returns `images[:, rows, columns]`; arbitrary values from outside."""
    batch, _, width, channels = images.shape
    numbers = (rows * width + columns).reshape(batch, -1, 1)
    flat = images.reshape(batch, -1, channels)
    return jnp.take_along_axis(flat, numbers, 1, mode="clip").reshape(images.shape)


def _read_by_products(images: Array, rows: Array, moves: Array, phases: int) -> Array:
    """Returns the same as `_read`, by one product for each line, first along rows, then columns.

    The pixel for (x, y) is first moved to place x of the input's row `rows[y, x]`. Under a rotation
    up to `phases` adjacent pixels of an output column may need that place. So output rows with the
    same remainder by `phases` get an intermediate image of their own.
    """
    height, width = images.shape[1:3]
    y, x = (grid[None, None].astype(jnp.float32) for grid in jnp.mgrid[:height, :width])
    by_x, by_y, offset = _as_factors(moves[:, 1], x.ndim)
    # The only output row of each phase that may read the input's row y at x.
    phase = jnp.arange(phases, dtype=jnp.float32)[None, :, None, None]
    served = phase + phases * jnp.round(((y - by_x * x - offset) / by_y - phase) / phases)
    columns = _sources(moves, x, served)[0]
    lines = images.astype(jnp.bfloat16)
    ones = jax.nn.one_hot(columns, width, axis=-2, dtype=jnp.bfloat16)
    along_rows = jnp.einsum("brjc,bprjx->bprcx", lines, ones)
    ones = jax.nn.one_hot(rows, height, axis=1, dtype=jnp.bfloat16)
    read = jnp.einsum("bprcx,bryx->bpyxc", along_rows, ones)
    own = jax.nn.one_hot(jnp.arange(height) % phases, phases, axis=0, dtype=jnp.bfloat16)
    return (read * own[None, :, :, None, None]).sum(1).astype(jnp.uint8)
