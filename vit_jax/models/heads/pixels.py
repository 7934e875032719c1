"""Reconstruction of masked images by one linear layer on a ViT's patches.

backbone/               a `VisionTransformer`
mask_token              [1, 1, width], in the place of masked patches
decoder/
  kernel                [width, patch_h, patch_w, channels]
  bias                  [patch_h, patch_w, channels]
"""

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.models.layers.basic import Linear, pair
from vit_jax.models.layers.initialization import with_axes
from vit_jax.models.traits import Traits, traits_of
from vit_jax.types import Array, Features


class PixelReconstruction(nn.Module):
    """A backbone that encodes all patches, masked ones as a token, and predicts their pixels.

    (Xie et al. 2022, SimMIM, section 3.3: the one-layer head.)

    Attributes:
      backbone: a `VisionTransformer`.
    """

    backbone: nn.Module

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns the traits of the backbone, which is what other codebases have a place for."""
        return traits_of(self.backbone)

    @nn.compact
    def __call__(self, images: Array, masked: Array | None = None, *, train: bool = False) -> Array:
        """Maps images `[batch, h, w, channels]` to float32 reconstructions of the same shape.

        masked: bool `[batch, patches]`, row by row; None masks nothing.
        """
        patch = pair(self.backbone.patch_size)
        batch, height, width, channels = images.shape
        rows, columns = height // patch[0], width // patch[1]
        init = nn.initializers.truncated_normal(0.02)
        boxed = with_axes(init, (None, None, "embed"))
        token = self.param("mask_token", boxed, (1, 1, self.backbone.width), jnp.float32)
        if masked is None:
            masked = jnp.zeros((batch, rows * columns), bool)
        found: Features = self.backbone(images, train=train, masked=(masked, token[0, 0]))
        axes = ("embed", None, None, "channels")
        decoder = Linear((*patch, channels), axes, kernel_init=init, name="decoder")
        assert found.tokens is not None
        pixels = decoder(found.tokens.astype(jnp.float32))
        pixels = pixels.reshape(batch, rows, columns, *patch, channels).swapaxes(2, 3)
        return pixels.reshape(batch, rows * patch[0], columns * patch[1], channels)
