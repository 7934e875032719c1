"""An encoder of some patches of an image, and a decoder that predicts the pixels of the others.

backbone/                     the encoder
decoder/
  embed/{kernel,bias}         [encoder's width, width]
  mask_token                  [1, 1, width]
  pos_embed                   [1, tokens, width], sines and cosines
  blocks/                     as in `models.vit`
  norm/{scale,bias}           [width]
  predict/{kernel,bias}       [width, pixels of a patch]
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.models.layers.basic import Linear, pair
from vit_jax.models.layers.encoder import Encoder
from vit_jax.models.layers.initialization import SCHEMES, with_axes
from vit_jax.models.layers.positions import sincos_table
from vit_jax.models.layers.transformer import run_blocks
from vit_jax.models.traits import Traits, traits_of
from vit_jax.types import Array, Features


class MaskedOutputs(NamedTuple):
    """The outputs of a masked autoencoder.

    Attributes:
      features: those of the encoder, of the patches that it saw.
      pixels: float32 `[batch, patches, height * width * channels of a patch]`, predictions for all
        patches, row by row. The values of a patch are ordered by row, column and channel.
    """

    features: Features
    pixels: Array


class PatchDecoder(Encoder):
    """The decoder of MAE (He et al. 2022, section 3): mask tokens join the encoded patches.

    The fields are those of `layers.encoder.Encoder`. Positions are a fixed table.

    Attributes:
      num_outputs: the length of the prediction for one patch.
    """

    num_outputs: int = 0

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        restore: Array,
        grid: tuple[int, int],
        *,
        num_prefix: int,
        train: bool = False,
    ) -> Array:
        """Maps encoded tokens to float32 predictions `[batch, patches, num_outputs]`.

        Args:
          tokens: `[batch, num_prefix + n, dim]`; the encoded patches follow `num_prefix` others.
          restore: int32 `[batch, patches]`: for each patch of the image, its number among the
            encoded patches, or n or more if it was not encoded.
          grid: (rows, columns) of the patches.
          num_prefix: the number of tokens before the patches, 0 or 1.
        """
        spec, scheme = self.block_spec(), SCHEMES[self.initialization]
        init: dict[str, Any] = {"dtype": spec.dtype, "kernel_init": scheme.kernel}
        x = Linear((self.width,), ("embed", None), **init, name="embed")(tokens)
        x = x.astype(spec.residual_dtype)  # So that small mask tokens are added to positions.
        token_init = with_axes(nn.initializers.normal(0.02), (None, None, "embed"))
        mask_token = self.param("mask_token", token_init, (1, 1, self.width), jnp.float32)
        batch, count = restore.shape
        missing = (batch, count + num_prefix - x.shape[1], self.width)
        masked = jnp.broadcast_to(mask_token.astype(x.dtype), missing)
        patches = jnp.concatenate([x[:, num_prefix:], masked], axis=1)
        patches = jnp.take_along_axis(patches, restore[:, :, None], axis=1)
        x = jnp.concatenate([x[:, :num_prefix], patches], axis=1)
        table = sincos_table(*grid, self.width, class_row=bool(num_prefix))
        table_init = with_axes(
            lambda _, shape, dtype: jnp.asarray(table, dtype).reshape(shape),
            (None, "tokens", "embed"),
        )
        x = x + self.param("pos_embed", table_init, table.shape, jnp.float32).astype(x.dtype)
        x = run_blocks(x, spec, self.stack_spec(), train=train)
        x = spec.make_norm("norm")(x)[:, num_prefix:]
        predict = Linear((self.num_outputs,), ("embed", None), **init, name="predict")
        return predict(x).astype(jnp.float32)


class MaskedAutoencoder(nn.Module):
    """A ViT that encodes some patches, and a decoder of the pixels of all (He et al. 2022, MAE).

    Attributes:
      backbone: a `VisionTransformer`; its class token, if it pools by it, is decoded too.
      decoder: the decoder.
    """

    backbone: nn.Module
    decoder: nn.Module

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns those of the encoder; see `vit_jax.models.traits`."""
        return traits_of(self.backbone)

    @nn.compact
    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        kept: Array | None = None,
        restore: Array | None = None,
    ) -> MaskedOutputs:
        """Encodes the patches `kept` of images `[batch, h, w, channels]` and predicts all pixels.

        Args:
          train: whether dropout and stochastic depth are on.
          kept: int32 `[batch, n]`, the numbers of the patches to encode; None for all.
          restore: int32 `[batch, patches]`, see `PatchDecoder`.
        """
        patch = pair(self.backbone.patch_size)
        grid = images.shape[1] // patch[0], images.shape[2] // patch[1]
        if kept is None:
            kept = restore = jnp.tile(jnp.arange(grid[0] * grid[1])[None], (len(images), 1))
        features: Features = self.backbone(images, train=train, kept=kept)
        assert features.tokens is not None
        prefix = []
        if self.backbone.pooling == "token":
            assert features.pooled is not None
            prefix = [features.pooled[:, None]]
        tokens = jnp.concatenate([*prefix, features.tokens], axis=1)
        pixels = self.decoder(tokens, restore, grid, num_prefix=len(prefix), train=train)
        return MaskedOutputs(features, pixels)
