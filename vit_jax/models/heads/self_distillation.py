"""A backbone with the heads of DINOv2.

backbone/               a `VisionTransformer` with a class token
mask_token              [1, 1, width], in the place of masked patches, where there are any
dino_head/, ibot_head/  see `heads.prototypes`; ibot_head only if patches have a head of their own
"""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.models.heads.prototypes import PrototypeHead
from vit_jax.models.layers.initialization import with_axes
from vit_jax.models.traits import Traits, traits_of
from vit_jax.types import Array, Features


class SelfDistillation(nn.Module):
    """The network that student and teacher share (Oquab et al. 2023, DINOv2, section 4).

    Attributes:
      backbone: a `VisionTransformer` with a class token.
      dino_head: maps class tokens to logits. ibot_head: does so with patches; None for the same.
      masks: whether patches may be masked.
    """

    backbone: nn.Module
    dino_head: PrototypeHead
    ibot_head: PrototypeHead | None = None
    masks: bool = True

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns the traits of the backbone, which is what other codebases have a place for."""
        return traits_of(self.backbone)

    def setup(self) -> None:
        if not self.masks:
            return
        init = with_axes(nn.initializers.zeros, (None, None, "embed"))
        shape = (1, 1, self.backbone.width)
        self.mask_token = self.param("mask_token", init, shape, jnp.float32)

    def __call__(self, images: Array) -> Array:
        """Returns the logits of class tokens; initialization creates all parameters."""
        found = self.encode(images)
        assert found.pooled is not None
        assert found.tokens is not None
        if self.is_initializing() and self.masks:
            self.patch_logits(found.tokens)
        return self.dino_head(found.pooled)

    def encode(
        self, images: Array, masked: Array | None = None, *, train: bool = False
    ) -> Features:
        """Encodes images, with a token for patches in `masked`, bool `[batch, patches]`."""
        given = None if masked is None else (masked, self.mask_token[0, 0])
        return self.backbone(images, train=train, masked=given)

    def class_logits(self, x: Array) -> Array:
        """Maps class tokens `[..., width]` to float32 logits."""
        return self.dino_head(x)

    def patch_logits(self, x: Array) -> Array:
        """Maps patch tokens `[..., width]` to float32 logits."""
        return (self.ibot_head or self.dino_head)(x)
