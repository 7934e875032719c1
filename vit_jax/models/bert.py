"""BERT (Devlin et al. 2019), the text tower of released image-text models (Zhai et al. 2022, LiT).

    token_embed                  [vocab_size, width]
    pos_embed                    [1, max_length, width]
    segment_embed                [2, width]; texts are of one segment, the first
    embed_norm/{scale,bias}
    blocks/                      stacked over layers; `blocks_0` ... with scan=False
      attn/, norm1/, mlp/, norm2/ as in `vit.py`, each norm after its residual

Token 0 is padding, which nothing attends to. The vector of a text is its first token's.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.errors import UserError
from vit_jax.models.layers.attention import SegmentIds
from vit_jax.models.layers.basic import make_norm
from vit_jax.models.layers.initialization import SCHEMES, with_axes
from vit_jax.models.layers.transformer import BlockSpec, StackSpec, scan_or_unroll
from vit_jax.models.registry import Variant
from vit_jax.models.traits import Traits, named_fields
from vit_jax.plugins import float_dtype
from vit_jax.types import Array, Features

NORM_EPSILON = 1e-12
NUM_SEGMENTS = 2
PADDING = 0


class PostNormBlock(nn.Module):
    """One block of the first transformers: x = norm1(x + attention(x)); x = norm2(x + mlp(x)).

    Dropout is flaxformer's (`bert.py`): of attention weights, of the outputs of attention and MLP,
    but not inside the MLP. All tokens of a text lose the same features of the MLP's output.
    """

    spec: BlockSpec
    train: bool

    @nn.compact
    def __call__(self, x: Array, drop_rate: None, segment_ids: SegmentIds) -> tuple[Array, None]:
        """Maps x `[batch, tokens, embed]` to (x, None), the pair that `nn.scan` expects."""
        del drop_rate
        spec = self.spec
        y = spec.make_attention(train=self.train, name="attn")(x, segment_ids=segment_ids)
        y = nn.Dropout(spec.dropout, deterministic=not self.train)(y)
        x = _norm("norm1", spec.dtype)(x + y)
        mlp = dataclasses.replace(spec, dropout=0.0).make_mlp(train=self.train, name="mlp")
        y = nn.Dropout(spec.dropout, broadcast_dims=(1,), deterministic=not self.train)(mlp(x))
        x = _norm("norm2", spec.dtype)(x + y)
        return nn.with_logical_constraint(x, ("batch", "tokens", "embed")), None


class Bert(nn.Module):
    """A text backbone: token ids to one vector a text.

    Attributes:
      vocab_size: number of token ids. max_length: texts have at most this many tokens.
      dropout: the rate after the embedding and in the blocks, attention weights included.
      width, depth, num_heads, mlp_dim, scan, remat, attention, dtype: as in `VisionTransformer`.
    """

    width: int
    depth: int
    num_heads: int
    mlp_dim: int | None = None
    vocab_size: int = 30_522
    max_length: int = 512
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    attention: str = "auto"
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        self.block_spec()
        self.stack_spec()
        super().__post_init__()

    @nn.nowrap
    def block_spec(self) -> BlockSpec:
        """Returns the spec of the encoder's blocks."""
        return BlockSpec.create(
            width=self.width,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            initialization="bert",
            attention=self.attention,
            dtype=float_dtype("dtype", self.dtype),
        )

    @nn.nowrap
    def stack_spec(self) -> StackSpec:
        """Returns how the encoder's blocks are stacked."""
        return StackSpec(self.depth, scan=self.scan, remat=self.remat)

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        named = named_fields(self, Bert)
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
        x = _norm("embed_norm", spec.dtype)(self._embed(tokens).astype(spec.dtype))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        everything = jnp.ones_like(tokens)
        segment_ids = (everything, (tokens != PADDING).astype(tokens.dtype))
        fields, stack = (spec, train), self.stack_spec()
        x = scan_or_unroll(PostNormBlock, fields, x, stack, (segment_ids,), train=train)
        return Features(grid=None, pooled=x[:, 0])

    @nn.nowrap
    def _embed(self, tokens: Array) -> Array:
        """Returns token, position and segment embeddings, float32 `[batch, length, width]`."""
        length = tokens.shape[1]
        if length > self.max_length:
            raise UserError(
                f"these texts have {length} tokens and max_length is {self.max_length}; cut them"
            )

        def table(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
            init = with_axes(SCHEMES["bert"].kernel, axes)
            return self.param(name, init, shape, jnp.float32)

        words = table("token_embed", (self.vocab_size, self.width), ("vocab", "embed"))
        axes = (None, "tokens", "embed")
        positions = table("pos_embed", (1, self.max_length, self.width), axes)
        segments = table("segment_embed", (NUM_SEGMENTS, self.width), (None, "embed"))
        return jnp.take(words, tokens, axis=0) + positions[:, :length] + segments[None, :1]


def _norm(name: str, dtype: DTypeLike) -> nn.Module:
    return make_norm("layernorm", name=name, dtype=dtype, epsilon=NORM_EPSILON)


# Listed at 16 tokens, LiT's length.
VARIANTS = {
    "bert_base": Variant(Bert, {"width": 768, "depth": 12, "num_heads": 12}, 16, None),
    "bert_large": Variant(Bert, {"width": 1024, "depth": 24, "num_heads": 16}, 16, None),
}
