"""Text transformer: the text tower of image-text models (CLIP, LiT, SigLIP).

    token_embed                  [vocab_size, width]
    pos_embed                    [1, tokens, width]
    blocks/, norm/, map_head/    as in `vit.py`

In LiT and SigLIP (Zhai et al. 2022, 2023) every token, padding included, is seen by all. In CLIP
(Radford et al. 2021) a token sees those before it, and a text's vector is that of its end token.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.heads.classifier import MapHead
from vit_jax.models.layers.basic import check_choice, stored_shape
from vit_jax.models.layers.encoder import Encoder
from vit_jax.models.layers.initialization import with_axes
from vit_jax.models.layers.transformer import run_blocks
from vit_jax.models.registry import Variant
from vit_jax.models.traits import VIT_NAMES, Traits, named_fields
from vit_jax.models.vit import SIZES
from vit_jax.types import Array, Features

POOLINGS = ("last", "first", "mean", "map", "end")

_NAMES: Mapping[str, str | Mapping[Any, str]] = {
    "pooling": {pooling: f"{pooling} pooling of texts" for pooling in POOLINGS},
    "causal": "a causal mask",
    "end_token": "an end token of texts",
    "norm_epsilon": "another norm epsilon",
    "activation": VIT_NAMES["activation"],
}


class TextTransformer(Encoder):
    """A text backbone: token ids to one vector a text.

    The fields of the blocks, and how they are run, are those of `layers.encoder.Encoder`.

    Attributes:
      vocab_size: number of token ids.
      pooling: "last" or "first" token, "mean" of all, "map" (a learned probe), or "end", the first
        `end_token` of a text.
      end_token: the number of that token; None takes the highest number in the text, as OpenAI's
        CLIP does.
      causal: whether a token attends only to itself and to those before it.
    """

    vocab_size: int = 32_000
    pooling: str = "last"
    end_token: int | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, POOLINGS)
        self.block_spec()
        self.stack_spec()
        super().__post_init__()

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        named = named_fields(self, TextTransformer, _NAMES)
        return Traits("a text tower alone", frozenset(named), reads_text=True, position="learned")

    @nn.nowrap
    def example_input(self, length: int, channels: int) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype of one text of `length` tokens, which have no channels."""
        del channels
        return jax.ShapeDtypeStruct((1, length), jnp.int32)

    @nn.compact
    def __call__(self, tokens: Array, *, train: bool = False) -> Features:
        """Encodes tokens int32 `[batch, length]`, numbers below `vocab_size`; there is no grid."""
        spec = self.block_spec()
        x = self._embed(tokens).astype(spec.residual_dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        mask = _causal_bias(tokens.shape[1]) if self.causal else None
        x = run_blocks(x, spec, self.stack_spec(), train=train, bias=mask)
        x = spec.make_norm("norm")(x)
        return Features(grid=None, pooled=self._pool(x, tokens, train))

    @nn.nowrap
    def _embed(self, tokens: Array) -> Array:
        """Returns token and position embeddings, float32 `[batch, length, width]`."""
        init = with_axes(
            nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0),
            ("vocab", "embed"),
        )
        table = self.param("token_embed", init, (self.vocab_size, self.width), jnp.float32)
        length = tokens.shape[1]
        held = stored_shape(self, "pos_embed")
        if held is not None and held[1] != length:
            raise UserError(
                f"the position table holds {held[1]} tokens but these texts have {length}; "
                f"pad or cut them to {held[1]}"
            )
        init = with_axes(nn.initializers.normal(stddev=self.width**-0.5), (None, "tokens", "embed"))
        positions = self.param("pos_embed", init, (1, length, self.width), jnp.float32)
        return jnp.take(table, tokens, axis=0) + positions

    @nn.nowrap
    def _pool(self, x: Array, tokens: Array, train: bool) -> Array:
        if self.pooling == "map":
            return MapHead(self.block_spec(), train, name="map_head")(x)[:, 0]
        if self.pooling == "mean":
            return jnp.mean(x, axis=1, dtype=jnp.float32)
        if self.pooling == "end":
            ends = tokens if self.end_token is None else tokens == self.end_token
            place = jnp.argmax(ends, axis=1)[:, None, None]
            return jnp.take_along_axis(x, place, axis=1)[:, 0]
        return x[:, -1] if self.pooling == "last" else x[:, 0]


def _causal_bias(length: int) -> Array:
    """Returns what keeps attention from later tokens, float32 `[1, 1, length, length]`."""
    seen = jnp.tril(jnp.ones((length, length), bool))
    return jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)[None, None]


# The sizes of the ViTs; listed at 64 tokens, SigLIP's length.
VARIANTS = {"text": Variant(TextTransformer, {}, input_size=None)} | {
    f"text_{size}": Variant(TextTransformer, SIZES[size], input_size=64, num_classes=None)
    for size in ("ti", "s", "m", "b", "l", "so400m", "h", "g")
}
