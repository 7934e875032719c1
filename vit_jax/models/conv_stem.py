"""ViTs whose patches come through several convolutions.

In MobileCLIP-B (Vasu et al. 2024) every convolution's stride is its side, so that the patches of an
image never overlap. The published model has a batch norm after each but the last, which inference
folds into the convolution; here the stem has the folded kernels and biases from the start.

With `stem_kernel` the convolutions overlap, which makes small ViTs learn faster and less sensitive
to the optimizer's settings (Xiao et al. 2021, "Early convolutions help transformers see better").

The parameters are those of `VisionTransformer` and, below `stem`, `conv0/{kernel,bias}` and, with
`stem_norm`, `norm0/{scale,bias}`, ...; the last convolution is `patch_embed`.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.errors import UserError
from vit_jax.models.layers.basic import (
    ACTIVATIONS,
    PatchEmbed,
    cut_patches,
    lift,
    make_norm,
)
from vit_jax.models.layers.initialization import with_axes
from vit_jax.models.registry import Variant
from vit_jax.models.traits import Traits
from vit_jax.models.vit import SIZES, VisionTransformer
from vit_jax.types import Array


class Convolution(nn.Module):
    """A convolution with a bias over `[b, H, W, c]` whose padding keeps the size at stride 1."""

    kernel: int
    stride: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes = ("conv_h", "conv_w", "conv_in", "conv_out")
        # Pixels that fill no cell are dropped, as everywhere else.
        x = x[:, : x.shape[1] // self.stride * self.stride]
        x = x[:, :, : x.shape[2] // self.stride * self.stride]
        shape = (self.kernel, self.kernel, x.shape[-1], self.width)
        init = with_axes(nn.initializers.lecun_normal(), axes)
        kernel = self.param("kernel", init, shape, jnp.float32)
        zeros = with_axes(nn.initializers.zeros, axes[-1:])
        bias = self.param("bias", zeros, (self.width,), jnp.float32)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            [(self.kernel // 2, self.kernel // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return nn.with_logical_constraint(
            y + lift(bias.astype(self.dtype), y.ndim), ("batch", None, None, axes[-1])
        )


class PatchStem(nn.Module):
    """Convolutions and exact GELU, from `[b, H, W, c]` to a smaller map.

    The attributes are those of `ConvStem` that begin with `stem_`.
    """

    strides: Sequence[int]
    width: int
    kernel: int | None
    norm: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, stride in enumerate(self.strides):
            if self.kernel is None:
                side = (stride, stride)
                embed = PatchEmbed(side, x.shape[-1], self.width, self.dtype, name=f"conv{i}")
                x = embed(cut_patches(x, side))
            else:
                conv = Convolution(self.kernel, stride, self.width, self.dtype, name=f"conv{i}")
                x = conv(x)
            if self.norm:
                name = f"norm{i}"
                x = make_norm("layernorm", name=name, dtype=self.dtype, axis="conv_out")(x)
            x = ACTIVATIONS["gelu"](x)
        return x


class ConvStem(VisionTransformer):
    """A ViT behind such a stem. `patch_size` counts cells of the stem's map.

    Attributes:
      stem_strides: of the convolutions before the last. stem_width: their channels.
      stem_kernel: the side of their kernels, an odd number; None is their stride. Xiao et al. have
        3.
      stem_norm: whether a norm over the channels follows each; theirs is a batch norm.
    """

    stem_strides: Sequence[int] = (4, 2)
    stem_width: int = 192
    stem_kernel: int | None = None
    stem_norm: bool = False

    def __post_init__(self) -> None:
        if self.stem_kernel is not None and (self.stem_kernel < 1 or self.stem_kernel % 2 == 0):
            raise UserError(f"stem_kernel={self.stem_kernel}: write an odd number, or None")
        super().__post_init__()

    @property
    def stem_stride(self) -> int:
        """Pixels from one cell of the feature map to the next."""
        return math.prod(self.stem_strides)

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        return super().traits().but("a convolutional stem", has_stem=True)

    @nn.nowrap
    def _stem(self, images: Array) -> Array:
        fields = (tuple(self.stem_strides), self.stem_width, self.stem_kernel, self.stem_norm)
        return PatchStem(*fields, jnp.dtype(self.dtype), name="stem")(images)


VARIANTS = {
    "conv_stem": Variant(ConvStem, {}, input_size=None),
    "conv_stem_b16": Variant(ConvStem, {**SIZES["b"], "patch_size": 2}, input_size=None),
}
