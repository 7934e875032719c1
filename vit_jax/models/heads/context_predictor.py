"""Prediction of an image's tokens from those of a part of it.

backbone/               a `VisionTransformer` without other tokens than patches
predictor/
  embed/{kernel,bias}   [width, predictor width], [predictor width]
  mask_token            [1, 1, predictor width]
  blocks/, norm/        as in a `VisionTransformer`
  proj/{kernel,bias}    [predictor width, width], [width]
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.models.layers.basic import Linear, pair
from vit_jax.models.layers.initialization import SCHEMES, with_axes
from vit_jax.models.layers.positions import grid_coordinates, sincos_2d
from vit_jax.models.layers.transformer import BlockSpec, StackSpec, padding_segments, run_blocks
from vit_jax.models.traits import Traits, traits_of
from vit_jax.types import Array, Features

Patches = tuple[Array, Array]
"""Numbers int32 `[batch, blocks, n]` of patches, and bool of that shape for those that count."""


class ContextPredictor(nn.Module):
    """A backbone that encodes contexts, and a narrow ViT that predicts targets from them.

    (Assran et al. 2023, I-JEPA, section 3.)

    Attributes:
      backbone: a `VisionTransformer`.
      width, depth, num_heads, mlp_dim: the size of the predictor; other fields of its blocks are
        those of the backbone.
    """

    backbone: nn.Module
    width: int = 384
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int | None = None

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns the traits of the backbone, which is what other codebases have a place for."""
        return traits_of(self.backbone)

    @nn.compact
    def __call__(
        self,
        images: Array,
        context: Patches | None = None,
        targets: Patches | None = None,
        *,
        train: bool = False,
    ) -> Array:
        """Returns predicted tokens float32 `[batch, targets, contexts, m, backbone width]`.

        Args:
          images: `[batch, h, w, channels]`.
          context, targets: the patches to encode, and those to predict. Without them, one context
            and one target have all patches, as initialization wants it.
        """
        patch = pair(self.backbone.patch_size)
        grid = images.shape[1] // patch[0], images.shape[2] // patch[1]
        if context is None or targets is None:
            numbers = jnp.arange(grid[0] * grid[1])[None, None]
            every = jnp.broadcast_to(numbers, (len(images), *numbers.shape[1:]))
            context = targets = (every, jnp.ones(every.shape, bool))
        contexts = context[0].shape[1]
        repeated = jnp.repeat(images, contexts, axis=0) if contexts > 1 else images
        kept = tuple(x.reshape(-1, x.shape[-1]) for x in context)
        found: Features = self.backbone(repeated, train=train, kept=kept)
        assert found.tokens is not None
        tokens = found.tokens.reshape(*context[0].shape, -1)
        sizes = {name: getattr(self, name) for name in ("width", "depth", "num_heads", "mlp_dim")}
        small = self.backbone.clone(parent=None, name=None, **sizes)
        spec, stack = small.block_spec(), small.stack_spec()
        predictor = _Predictor(self.width, grid, spec, stack, train, name="predictor")
        return predictor(tokens, context, targets)


class _Predictor(nn.Module):
    width: int
    grid: tuple[int, int]
    spec: BlockSpec
    stack: StackSpec
    train: bool

    @nn.compact
    def __call__(self, tokens: Array, context: Patches, targets: Patches) -> Array:
        dense: dict[str, Any] = {
            "kernel_init": SCHEMES[self.spec.initialization].kernel,
            "dtype": self.spec.dtype,
        }
        init = nn.initializers.truncated_normal(0.02)
        init = with_axes(init, (None, None, "embed"))
        mask_token = self.param("mask_token", init, (1, 1, self.width), jnp.float32)
        seen = Linear((self.width,), ("embed", None), name="embed", **dense)(tokens)
        seen += self._positions(context[0]).astype(seen.dtype)
        asked = (self._positions(targets[0]) + mask_token[None]).astype(seen.dtype)
        n, m = seen.shape[2], asked.shape[2]
        # One sequence for each pair of a target and a context.
        pairs = (len(seen), asked.shape[1], seen.shape[1])

        def paired(context: Array, target: Array) -> Array:
            context = jnp.broadcast_to(context[:, None], (*pairs, *context.shape[2:]))
            target = jnp.broadcast_to(target[:, :, None], (*pairs, *target.shape[2:]))
            joined = jnp.concatenate([context, target], axis=3)
            return joined.reshape(-1, n + m, *joined.shape[4:])

        segments = padding_segments(paired(context[1], targets[1]))
        x = paired(seen, asked)
        x = run_blocks(x, self.spec, self.stack, train=self.train, segment_ids=segments)
        x = self.spec.make_norm("norm")(x[:, n:])
        out = Linear((tokens.shape[-1],), (None, "embed"), name="proj", **dense)(x)
        return out.astype(jnp.float32).reshape(*pairs, m, -1)

    @nn.nowrap
    def _positions(self, numbers: Array) -> Array:
        places = grid_coordinates(*self.grid)[numbers]
        return sincos_2d(places, self.width, endpoint=False)
