"""Making a checkpoint's arrays fit another image size, pooling, patch size or channel count.

Pure functions on NumPy arrays. A table of positions is `[1, tokens, width]`, row by row.
"""

import math
from collections.abc import Sequence

import numpy as np

from vit_jax import models
from vit_jax.errors import UserError, nearest
from vit_jax.models.layers.positions import grid_coordinates, sincos_2d
from vit_jax.models.layers.resize import cubic_resize_matrix, linear_resize_matrix

Grid = tuple[int, int]

INTERPOLATIONS = ("corners", "bilinear", "bicubic", "torch_bilinear", "torch_bicubic")


def square_side(count: int) -> int | None:
    """The side of a square of `count` cells, by exact integer arithmetic; None if there is none."""
    side = math.isqrt(count)
    return side if side * side == count and count else None


def split_class_row(
    table: np.ndarray,
    *,
    has_class_token: bool,
    row_stored: bool | None = None,
    num_patches: int | None = None,
    assumed: bool = False,
) -> tuple[np.ndarray | None, np.ndarray]:
    """The class token's row `[1, 1, width]` (or None) and the patches' rows of a table.

    Args:
      has_class_token: the checkpoint has one, whether beside the table or added to its position and
        kept in the table.
      row_stored: whether it has a row, where the format says so. Otherwise a square number of
        tokens has none (196 is 14 * 14, never 195 and a class token) and one more than a square has
        one.
      num_patches: of the target, which other numbers are compared with.
      assumed: what holds where nothing tells.
    """
    tokens = table.shape[1]
    if row_stored is None:
        if square_side(tokens) or square_side(tokens - 1):
            row_stored = square_side(tokens) is None
        elif num_patches in (tokens, tokens - 1):
            row_stored = num_patches == tokens - 1
        else:
            row_stored = assumed
    return (table[:, :1], table[:, 1:]) if has_class_token and row_stored else (None, table)


def infer_grid(num_patches: int, target: Grid | None) -> Grid:
    """(rows, columns) of a checkpoint's patches: those of the target, or a square.

    Raises:
      UserError: both would do and differ, or neither does.
    """
    side = square_side(num_patches)
    if target is not None and target[0] * target[1] == num_patches:
        if side is None or target == (side, side):
            return target
        found = f"either {side}x{side} or {target[0]}x{target[1]}"
    elif side is not None:
        return (side, side)
    else:
        found = "no square grid"
    raise UserError(
        f"the checkpoint's {num_patches} positions make {found}; write source_grid=(rows, columns)"
    )


def resize_positions(
    patches: np.ndarray,
    old: Grid,
    new: Grid,
    interpolation: str = "corners",
    *,
    keeps_aspect: bool = False,
) -> np.ndarray:
    """Returns a table of patch positions `[1, rows * columns, width]` for another grid.

    keeps_aspect: the table is resized to a square as long as the new grid's longer side, and the
      grid has its first rows and columns (Dehghani et al. 2023, NaViT, section 3).
    interpolation:
      "corners": bilinear with the corners of the two grids on top of one another and no
        antialiasing, as vision_transformer and big_vision do it.
      "bilinear", "bicubic": half-pixel centres, antialiased, as FlexiViT and timm do it.
      "torch_bilinear", "torch_bicubic": half-pixel centres and no antialiasing, as transformers
        does it with `torch.nn.functional.interpolate`.
    """
    if interpolation not in INTERPOLATIONS:
        hint = nearest(interpolation, INTERPOLATIONS)
        raise UserError(f"interpolation={interpolation!r} is not known; {hint}")
    if old == new:
        return patches
    whole = (max(new),) * 2 if keeps_aspect else new
    rows, columns = (
        _matrix(o, w, interpolation)[:n] for o, w, n in zip(old, whole, new, strict=True)
    )
    table = patches.reshape(*old, -1).astype(np.float64)
    table = np.einsum("ip,jq,pqd->ijd", rows, columns, table, optimize=True)
    return table.reshape(1, new[0] * new[1], -1).astype(patches.dtype)


def resize_bias(table: np.ndarray, old: Grid, new: Grid, interpolation: str) -> np.ndarray:
    """Returns a table of biases by the offset of two patches, `[offsets, heads]`, for another grid.

    What follows the offsets, three rows of a class token, stays.

    interpolation: "torch_bilinear" as in `resize_positions`, which transformers does, or
      "geometric", which timm does after BEiT's fine-tuning code: linear between the old offsets,
      which are spread over the new range with steps that grow from the center by one factor.
    """
    count = (2 * old[0] - 1) * (2 * old[1] - 1)
    sides = [(2 * n - 1, 2 * m - 1) for n, m in zip(old, new, strict=True)]
    make = _geometric_matrix if interpolation == "geometric" else _bilinear_matrix
    rows, columns = (make(*side) for side in sides)
    square = table[:count].reshape(sides[0][0], sides[1][0], -1).astype(np.float64)
    resized = np.einsum("ip,jq,pqh->ijh", rows, columns, square, optimize=True)
    resized = resized.reshape(-1, table.shape[-1]).astype(table.dtype)
    return np.concatenate([resized, table[count:]])


def _bilinear_matrix(old: int, new: int) -> np.ndarray:
    return _matrix(old, new, "torch_bilinear")


def _geometric_matrix(old: int, new: int) -> np.ndarray:
    """Returns linear interpolation weights `[new, old]` between places of a geometric series."""
    half, reach, low, high = old // 2, new // 2, 1.01, 1.5
    while high - low > 1e-6:
        factor = (low + high) / 2
        too_far = (1 - factor**half) / (1 - factor) > reach
        low, high = (low, factor) if too_far else (factor, high)
    steps = np.cumsum([1.0, *(factor**i for i in range(1, half))])[:half]
    places = np.concatenate([-steps[::-1], [0.0], steps])
    wanted = np.arange(new) - reach
    return np.stack([np.interp(wanted, places, one) for one in np.eye(old)], axis=1)


def _matrix(old: int, new: int, interpolation: str) -> np.ndarray:
    """Interpolation weights `[new, old]`."""
    if interpolation == "corners":
        places = np.linspace(0.0, old - 1.0, new) if new > 1 else np.zeros(1)
        return np.maximum(0.0, 1.0 - np.abs(np.arange(old)[None] - places[:, None]))
    if interpolation == "bilinear":
        return linear_resize_matrix(old, new)
    if interpolation == "torch_bilinear":
        places = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0.0, old - 1.0)
        return np.maximum(0.0, 1.0 - np.abs(np.arange(old)[None] - places[:, None]))
    return cubic_resize_matrix(old, new, antialias=interpolation == "bicubic")


def sincos_table(grid: Grid, width: int, position: str = "sincos2d") -> np.ndarray:
    """Returns the fixed table that a model with `position` computes, `[1, patches, width]`."""
    endpoint = position == "sincos2d"
    return np.asarray(sincos_2d(grid_coordinates(*grid), width, endpoint=endpoint))[None]


def resize_patches(kernel: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """A patch kernel `[ph, pw, channels, width]` for another patch size, by pseudo-inverse."""
    return np.asarray(models.resize_patch_kernel(kernel, patch))


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A patch kernel `[ph, pw, channels, width]` for images of another number of channels.

    Channels are repeated in turn, sharing the weight, or added up in turn: an image whose channels
    are all equal embeds as before, and one channel gets the sum of all.
    """
    held = kernel.shape[2]
    if held == channels:
        return kernel
    if channels > held:
        source = np.arange(channels) % held
        share = np.bincount(source).astype(kernel.dtype)[source]
        return kernel[:, :, source] / share[None, None, :, None]
    parts = [kernel[:, :, first::channels].sum(axis=2) for first in range(channels)]
    return np.stack(parts, axis=2)
