"""Positions of tokens: grid coordinates, sin-cos tables and two-dimensional rotary embeddings.

Coordinates are (row, column) pairs, float32, so that subsets of patches and non-square grids need
no special case. Tokens without a place (class token, registers) are not rotated.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.layers.basic import lift
from vit_jax.models.layers.initialization import with_axes
from vit_jax.types import Array

POSITIONS = ("learned", "sincos2d", "sincos2d_mae", "rope", "rope_dinov3", "rope_mixed", "none")

ROPE_BASE = 100.0  # of the axial and the DINOv3 form alike
MIXED_ROPE_BASE = 10.0


def grid_coordinates(rows: int, columns: int) -> Array:
    """Returns (row, column) of every cell, row by row: float32 `[rows * columns, 2]`."""
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    return jnp.stack([row, column], axis=-1).reshape(-1, 2).astype(jnp.float32)


def sincos_2d(
    coordinates: Array, width: int, max_wavelength: float = 10_000.0, *, endpoint: bool = True
) -> Array:
    """Embeds `[..., 2]` coordinates as `[..., width]` sines and cosines (Chen et al. 2021).

    The first half of the channels holds the column (sines, then cosines), the second half the row.
    Frequencies run geometrically from 1 to 1 / max_wavelength, which is included with `endpoint`
    alone, and not in the tables of MAE and I-JEPA.
    """
    exponents = jnp.linspace(0.0, 1.0, width // 4, endpoint=endpoint)
    frequencies = lift(max_wavelength**-exponents, coordinates.ndim)
    row, column = jnp.split(coordinates, 2, axis=-1)
    parts = [f(place * frequencies) for place in (column, row) for f in (jnp.sin, jnp.cos)]
    return jnp.concatenate(parts, axis=-1)


def rotary_angles(
    kind: str,
    coordinates: Array,
    grid: Array,
    head_dim: int,
    *,
    base: float | None = None,
    reference: Sequence[int] | None = None,
    offset: float = 0.0,
    columns_first: bool = False,
) -> Array:
    """Returns angles of axial rotary embeddings, `[..., tokens, 1, head_dim / 2]`.

    Half of the pairs of channels rotate with the row, half with the column.

    kind: "axial" rotates by the index of the cell (Heo et al. 2024, RoPE-ViT); "dinov3" by the
      center of the cell in an image that spans -1..1 both ways, one full turn per unit at the
      highest frequency (Siméoni et al. 2025, DINOv3).
    coordinates: `[..., tokens, 2]`. grid: (rows, columns) of the image, broadcastable to it.
    base: the frequencies run from 1 to nearly 1 / base; None is `ROPE_BASE`.
    reference: (rows, columns) onto which the grid is scaled, so that images of another size than in
      pre-training turn by the same angles (Fang et al. 2023, EVA-02). offset: added to indices.
    columns_first: the first half of the pairs rotates with the column.
    """
    pairs = head_dim // 4
    if offset:
        coordinates = coordinates + offset
    if reference is not None:
        scale = jnp.asarray(reference, jnp.float32) / grid
        coordinates = coordinates * lift(scale, coordinates.ndim)
    if kind == "dinov3":
        grid = lift(grid, coordinates.ndim)
        coordinates = (2.0 * (coordinates + 0.5) / grid - 1.0) * (2 * math.pi)
    if columns_first:
        coordinates = coordinates[..., ::-1]
    frequencies = (base or ROPE_BASE) ** -(jnp.arange(pairs) / pairs)
    angles = coordinates[..., None] * lift(
        frequencies, coordinates.ndim + 1
    )  # [..., tokens, 2, pairs]
    return angles.reshape(*coordinates.shape[:-1], 1, 2 * pairs)


class MixedFrequencies(nn.Module):
    """Learned directions of rotation, one set per head (Heo et al. 2024, "mixed" RoPE).

    Parameter: `frequencies` `[2, heads, head_dim / 2]` (row, column), initialized as the
    axial frequencies, rotated by a random angle in every head.
    """

    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(self, coordinates: Array) -> Array:
        """Maps coordinates `[..., tokens, 2]` to angles `[..., tokens, heads, head_dim / 2]`."""
        axes = (None, "heads", "head_dim")
        init = with_axes(self._init, axes)
        shape = (2, self.num_heads, self.head_dim // 2)
        frequencies = self.param("frequencies", init, shape, jnp.float32)
        return jnp.einsum("...tc,chf->...thf", coordinates, frequencies)

    @nn.nowrap
    def _init(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        _, heads, half = shape
        magnitude = MIXED_ROPE_BASE ** -(jnp.arange(half // 2) / (half // 2))
        turn = jax.random.uniform(key, (heads, 1), maxval=2 * math.pi)
        # Two orthogonal directions a head, as rows and columns are in the axial form.
        direction = jnp.concatenate([turn, turn + math.pi / 2], axis=-1)[:, :, None]
        magnitude = lift(magnitude, direction.ndim)
        row = (magnitude * jnp.sin(direction)).reshape(heads, half)
        column = (magnitude * jnp.cos(direction)).reshape(heads, half)
        return jnp.stack([row, column]).astype(dtype)


def rotate(x: Array, angles: Array, *, interleaved: bool = False) -> Array:
    """Rotates each pair of channels (i, i + head_dim / 2) by `angles`, in float32.

    x: `[batch, tokens, heads, head_dim]`. angles: `[(batch,) tokens, heads or 1, head_dim / 2]`.
    interleaved: the pairs are (2 i, 2 i + 1) instead (Su et al. 2021, RoFormer).
    """
    angles = lift(angles, x.ndim)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if interleaved:
        first, second = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), -1, 0)
        pairs = [first * cos - second * sin, second * cos + first * sin]
        return jnp.stack(pairs, axis=-1).reshape(x.shape).astype(x.dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def check_position(position: str, width: int, head_dim: int) -> None:
    """Raises `UserError` where the channels cannot be shared out between rows and columns."""
    if position.startswith("sincos2d") and width % 4:
        raise UserError(f"position={position!r} needs a width divisible by 4, not {width}")
    if position.startswith("rope") and head_dim % 4:
        raise UserError(
            f"position={position!r} needs width / num_heads divisible by 4, not {head_dim}"
        )


def sincos_table(rows: int, columns: int, width: int, *, class_row: bool = False) -> np.ndarray:
    """Returns the fixed table of MAE and I-JEPA, float32 `[1, tokens, width]`.

    (He et al. 2022, MAE.) It is ordered as `sincos_2d`, but its frequencies stop one step before
    1 / 10,000. The table of released models is computed in float64, as it is here.

    class_row: puts a row of zeros in front, for the class token.
    """
    frequencies = 10_000.0 ** -np.linspace(0.0, 1.0, width // 4, endpoint=False)
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    table = np.concatenate([f(x) for x in angles for f in (np.sin, np.cos)], axis=-1)
    table = np.concatenate([np.zeros((int(class_row), width)), table])
    return table[None].astype(np.float32)
