"""Tables of positions as other codebases keep them, with or without the class token's row."""

from typing import Any

import numpy as np

from vit_jax import models
from vit_jax.checkpoints.fit import surgery
from vit_jax.checkpoints.formats import ImageSize
from vit_jax.checkpoints.weights import CLS, PATCHES, POSITIONS, Arrays
from vit_jax.errors import UserError


def stored(
    arrays: Arrays, backbone: Any, image_size: ImageSize, *, class_row: bool | None
) -> tuple[Arrays, bool]:
    """Returns the arrays with a table of positions, and whether it has the class token's row.

    Positions that the model computes are written out; none are a table of zeros. class_row: True
    and False put that row in (zero) or out (added to the class token); None leaves it.
    """
    traits = models.traits_of(backbone)
    has_row = POSITIONS in arrays and CLS in arrays and traits.class_token_position
    if POSITIONS not in arrays:
        arrays = {**arrays, POSITIONS: _computed(arrays, traits, image_size)}
    table = arrays[POSITIONS]
    if class_row and CLS in arrays and not has_row:
        table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
        return {**arrays, POSITIONS: table}, True
    if class_row is False and has_row:
        folded = {CLS: arrays[CLS] + table[:, :1], POSITIONS: table[:, 1:]}
        return {**arrays, **folded}, False
    return arrays, has_row


def _computed(arrays: Arrays, traits: models.Traits, image_size: ImageSize) -> np.ndarray:
    if image_size is None or "a hybrid" in traits.named:
        raise UserError(
            f"position={traits.position!r} has to be written out as a table, whose size is not"
            " known; write image_size=(height, width), for a hybrid --to=orbax"
        )
    height, width = check_size(arrays, image_size, None)
    patch_height, patch_width, _, channels = arrays[PATCHES].shape
    grid = (height // patch_height, width // patch_width)
    if traits.position == "sincos2d":
        return surgery.sincos_table(grid, channels)
    return np.zeros((1, grid[0] * grid[1], channels), np.float32)


def image_size_of(arrays: Arrays, given: ImageSize, class_row: bool) -> tuple[int, int]:
    """Returns (height, width) of images whose patches fill the table; see `check_size`."""
    return check_size(arrays, given, arrays[POSITIONS].shape[1] - int(class_row))


def check_size(arrays: Arrays, given: ImageSize, num_patches: int | None) -> tuple[int, int]:
    """Returns (height, width) as given, or of a square grid of `num_patches`.

    Raises:
      UserError: the given size makes another number of patches, or none is given and there is no
        such square.
    """
    height, width = arrays[PATCHES].shape[:2]
    if given is None:
        side = surgery.square_side(num_patches or 0)
        if side is None:
            reason = "the model does not tell the size of its images"
            if num_patches is not None:
                reason = f"{num_patches} patches make no square image"
            raise UserError(f"{reason}; write image_size=(height, width)")
        return side * height, side * width
    size = (given, given) if isinstance(given, int) else (int(given[0]), int(given[1]))
    patches = -(-size[0] // height) * -(-size[1] // width), size[0] // height * (size[1] // width)
    if num_patches is not None and num_patches not in patches:
        raise UserError(
            f"image_size={size} makes {patches[1]} patches, the model has {num_patches}"
        )
    return size


def offsets(arrays: Arrays) -> int | None:
    """Returns the number of offsets between patches in a table of relative positions, if any."""
    table = next((x for n, x in arrays.items() if n.endswith("/position_bias/table")), None)
    # Three more rows are a class token's.
    return None if table is None else len(table) - 3 * (CLS in arrays)


def size_of_offsets(arrays: Arrays, given: ImageSize) -> tuple[int, int]:
    """Returns (height, width) as given, or of a square image that has a table's offsets.

    Raises:
      UserError: the given size has other offsets, or none is given and there is no such square.
    """
    count = offsets(arrays)
    # A side of n patches has 2 n - 1 offsets.
    edge = surgery.square_side(max(count or 0, 0))
    told = None if given is not None or edge is None else ((edge + 1) // 2) ** 2
    size = check_size(arrays, given, told)
    height, width = arrays[PATCHES].shape[:2]
    found = (2 * (size[0] // height) - 1) * (2 * (size[1] // width) - 1)
    if count not in (None, found):
        raise UserError(f"image_size={size} makes {found} offsets, the model has {count}")
    return size
