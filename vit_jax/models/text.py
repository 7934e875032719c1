"""Text transformer: the text tower of image-text models (Zhai et al. 2022, LiT; 2023, SigLIP).

    token_embed                  [vocab_size, width]
    pos_embed                    [1, tokens, width]
    blocks/, norm/, map_head/    as in `vit.py`

There is no mask: every token, padding included, is seen by all, as these models were trained.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.heads.classifier import MapHead
from vit_jax.models.layers.basic import check_choice, stored_shape
from vit_jax.models.layers.encoder import Encoder
from vit_jax.models.layers.transformer import run_blocks
from vit_jax.models.registry import Variant
from vit_jax.models.traits import Traits, named_fields
from vit_jax.models.vit import SIZES
from vit_jax.types import Array, Features

POOLINGS = ("last", "first", "mean", "map")

_NAMES = {"pooling": {pooling: f"{pooling} pooling of texts" for pooling in POOLINGS}}


class TextTransformer(Encoder):
    """A text backbone: token ids to one vector a text.

    The fields of the blocks, and how they are run, are those of `layers.encoder.Encoder`.

    Attributes:
      vocab_size: number of token ids.
      pooling: "last" or "first" token, "mean" of all, or "map" (a learned probe).
    """

    vocab_size: int = 32_000
    pooling: str = "last"

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
        x = run_blocks(x, spec, self.stack_spec(), train=train)
        x = spec.make_norm("norm")(x)
        return Features(grid=None, pooled=self._pool(x, train))

    @nn.nowrap
    def _embed(self, tokens: Array) -> Array:
        """Returns token and position embeddings, float32 `[batch, length, width]`."""
        init = nn.with_logical_partitioning(
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
        init = nn.with_logical_partitioning(
            nn.initializers.normal(stddev=self.width**-0.5), (None, "tokens", "embed")
        )
        positions = self.param("pos_embed", init, (1, length, self.width), jnp.float32)
        return jnp.take(table, tokens, axis=0) + positions

    @nn.nowrap
    def _pool(self, x: Array, train: bool) -> Array:
        if self.pooling == "map":
            return MapHead(self.block_spec(), train, name="map_head")(x)[:, 0]
        if self.pooling == "mean":
            return jnp.mean(x, axis=1, dtype=jnp.float32)
        return x[:, -1] if self.pooling == "last" else x[:, 0]


# The sizes of the ViTs; listed at 64 tokens, SigLIP's length.
VARIANTS = {"text": Variant(TextTransformer, {}, input_size=None)} | {
    f"text_{size}": Variant(TextTransformer, SIZES[size], input_size=64, num_classes=None)
    for size in ("ti", "s", "m", "b", "l", "so400m", "h", "g")
}
