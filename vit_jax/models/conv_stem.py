"""ViTs whose patches come through several convolutions (Vasu et al. 2024, MobileCLIP-B).

Every convolution's stride is its side, so that the patches of an image never overlap. The
published model has a batch norm after each but the last, which inference folds into the
convolution; here the stem has the folded kernels and biases from the start.

The parameters are those of `VisionTransformer` and, below `stem`, `conv0/{kernel,bias}`, ...; the
last convolution is `patch_embed`.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.layers.basic import ACTIVATIONS, PatchEmbed, cut_patches
from vit_jax.models.registry import Variant
from vit_jax.models.traits import Traits
from vit_jax.models.vit import SIZES, VisionTransformer
from vit_jax.types import Array


class PatchStem(nn.Module):
    """Convolutions without overlap and exact GELU, from `[b, H, W, c]` to a smaller map."""

    strides: Sequence[int]
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, stride in enumerate(self.strides):
            patches = cut_patches(x, (stride, stride))
            embed = PatchEmbed((stride,) * 2, x.shape[-1], self.width, self.dtype, name=f"conv{i}")
            x = ACTIVATIONS["gelu"](embed(patches))
        return x


class ConvStem(VisionTransformer):
    """A ViT behind such a stem. `patch_size` counts cells of the stem's map.

    Attributes:
      stem_strides: of the convolutions before the last. stem_width: their channels.
    """

    stem_strides: Sequence[int] = (4, 2)
    stem_width: int = 192

    @property
    def stem_stride(self) -> int:
        """Pixels from one cell of the feature map to the next."""
        return math.prod(self.stem_strides)

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        return super().traits().but("a convolutional stem")

    @nn.nowrap
    def _stem(self, images: Array) -> Array:
        strides, dtype = tuple(self.stem_strides), jnp.dtype(self.dtype)
        return PatchStem(strides, self.stem_width, dtype, name="stem")(images)


VARIANTS = {"conv_stem_b16": Variant(ConvStem, {**SIZES["b"], "patch_size": 2}, input_size=None)}
