"""FlexiViT (Beyer et al. 2023): one set of weights for any patch size and any grid.

The patch kernel is kept at one size and resized to the patches at hand by a pseudo-inverse, so that
a resized image's patches embed like the original's; the position table is kept for one grid and
interpolated. The parameters are those of `vit.py`, with `patch_embed/kernel`
`[kernel_size, kernel_size, channels, width]` and `pos_embed` `[1, table_grid ** 2, width]`.
"""

from collections.abc import Sequence

import flax.linen as nn

from vit_jax.errors import UserError
from vit_jax.models.layers.basic import pair
from vit_jax.models.layers.resize import resize_grid
from vit_jax.models.registry import Variant
from vit_jax.models.traits import Traits
from vit_jax.models.vit import SIZES, VisionTransformer
from vit_jax.types import Array


class FlexiViT(VisionTransformer):
    """A ViT whose parameters depend neither on `patch_size` nor on the size of images.

    A loop of one's own may draw a patch size every step and apply `model.clone(patch_size=...)` to
    the same parameters, as the authors trained it; `train` keeps to one. The class token has no
    position. The other fields are those of `VisionTransformer`.

    Attributes:
      kernel_size: side at which the patch kernel is kept. table_grid: side of the grid for which
        learned positions are kept.
    """

    class_token_position: bool = False
    kernel_size: int = 32
    table_grid: int = 7

    def __post_init__(self) -> None:
        if self.class_token_position:
            raise UserError("FlexiViT's class token has no position; drop class_token_position")
        super().__post_init__()

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        return super().traits().but("a FlexiViT", table_grid=(self.table_grid, self.table_grid))

    @nn.nowrap
    def _kept_patch(self) -> tuple[int, int]:
        return pair(self.kernel_size)

    @nn.nowrap
    def _add_positions(
        self, x: Array, coordinates: Array, grid: Sequence[int]
    ) -> tuple[Array, Array | None]:
        if self.position != "learned":
            return super()._add_positions(x, coordinates, grid)
        side = self.table_grid
        table = self._position_table(side * side).reshape(side, side, self.width)
        positions = resize_grid(table, grid).reshape(1, -1, self.width)
        return x + positions.astype(x.dtype), None


VARIANTS = {
    f"flexivit_{size}": Variant(FlexiViT, {**SIZES[size], "patch_size": 16}, input_size=240)
    for size in ("s", "b", "l")
}
