"""Hybrids: a ResNet's feature map, cut into patches, for a Vision Transformer.

The parameters are those of `VisionTransformer` (see `vit.py`) and, below `stem`, of a `ResNetStem`
(see `resnet.py`). Patch sizes count cells of the feature map; the number in a name is the stride
from pixels to tokens (Dosovitskiy et al. 2021; Steiner et al. 2022).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.models.registry import Variant
from vit_jax.models.resnet import ResNetStem, Style, check_width_factor
from vit_jax.models.traits import Traits
from vit_jax.models.vit import SIZES, VisionTransformer
from vit_jax.types import Array


class Hybrid(VisionTransformer):
    """A ViT over a ResNet's feature map. Its other fields are those of `VisionTransformer`.

    Attributes:
      stages: units of each ResNet stage; () leaves the root convolution and pooling alone.
      width_factor: multiplies the ResNet's channels.
      stem_variance_epsilon, stem_norm_epsilon: those of the ResNet's standardized kernels and of
        its group norms, see `resnet.Style`; timm has 1e-8 and 1e-5 with the same weights.
    """

    stages: Sequence[int] = ()
    width_factor: float = 1.0
    stem_variance_epsilon: float | None = None
    stem_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_width_factor(self.width_factor)
        super().__post_init__()

    @property
    def stem_stride(self) -> int:
        """Pixels from one cell of the feature map to the next."""
        return 4 * 2 ** max(0, len(self.stages) - 1)

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        told = {"a hybrid"}
        if (self.stem_variance_epsilon, self.stem_norm_epsilon) != (None, 1e-6):
            told.add("another epsilon of the stem")
        return super().traits().but(*told, has_stem=True)

    @nn.nowrap
    def _stem(self, images: Array) -> Array:
        dtype = jnp.dtype(self.dtype)
        epsilons = (self.stem_variance_epsilon, self.stem_norm_epsilon)
        style = Style(False, *epsilons)
        return ResNetStem(tuple(self.stages), self.width_factor, dtype, style, name="stem")(images)


def _variant(size: str, patch: int, stages: tuple[int, ...]) -> Variant:
    return Variant(Hybrid, {**SIZES[size], "patch_size": patch, "stages": stages})


VARIANTS = {
    "r_ti16": _variant("ti", 8, ()),
    "r26_s32": _variant("s", 1, (2, 2, 2, 2)),
    "r26_b32": _variant("b", 1, (2, 2, 2, 2)),
    "r50_b16": _variant("b", 1, (3, 4, 9)),
    "r50_l32": _variant("l", 1, (3, 4, 6, 3)),
}
