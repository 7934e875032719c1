"""The fields of every encoder that is a stack of transformer blocks."""

import dataclasses
from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike

from vit_jax.models.layers.basic import NORM_EPSILON
from vit_jax.models.layers.transformer import BlockSpec, StackSpec
from vit_jax.plugins import float_dtype


class Encoder(nn.Module, kw_only=True):
    """The blocks of an encoder; a base class that computes nothing itself.

    The defaults are the blocks of the ViT paper. Released models differ from them in one field or
    in several, which keep the names that these models' own code has where there is one.

    Attributes:
      width, depth, num_heads: the size of the encoder; `mlp_dim` None is four times the width.
      num_kv_heads: the number of heads of keys and values, each of which serves several of the
        queries' (Ainslie et al. 2023, GQA); None is `num_heads`.
      norm: "layernorm" or "rmsnorm". norm_epsilon: what every norm adds to the variance; 1e-6 in
        JAX's ViTs and in timm, 1e-5 in CLIP and DINOv3, 1e-12 in Hugging Face's ViT.
      mlp: "gelu" (two matrices around `activation`) or "swiglu" (three; Shazeer 2020).
      activation: "gelu_tanh" as JAX's ViTs were trained, "gelu" (exact) as PyTorch's, "quick_gelu"
        (OpenAI's CLIP) or "silu"; of the MLPs that have no gate.
      qkv_bias, key_bias, proj_bias, mlp_bias: whether there are biases on queries, keys and values;
        on keys if so (softmax does not see them; BEiT and EVA have none); on the attention's output
        projection; in the MLP.
      qk_norm, parallel: the choices of ViT-22B (Dehghani et al. 2023): norms of queries and keys,
        and attention and MLP that read the same norm and are added together.
      attention_norm, mlp_norm: norms before the attention's output projection and before the MLP's
        second matrix (Wang et al. 2022, Magneto, "sub-LN"; Fang et al. 2023, EVA-02).
      differential: each head subtracts one attention map from another (Ye et al. 2025; see
        `layers.differential`).
      post_norm: the norm of each branch comes after its layer, before the sum (Liu et al. 2022,
        Swin V2), not before the layer.
      layer_scale: the initial scale of every residual branch (Touvron et al. 2021, CaiT), or None
        for no scale. mlp_layer_scale: whether the MLP's branch has that scale, too.
      rope_interleaved: rotary positions turn the channels (2 i, 2 i + 1) together (Su et al. 2021,
        RoFormer; EVA-02), not (i, i + head_dim / 2).
      drop_path: the rate of stochastic depth in the last block, which grows linearly from 0; all
        blocks have it with constant_drop_path (Touvron et al. 2022, DeiT III). drop_path_exact:
        drop an exact share of the batch above a rate of 0.1 (Oquab et al. 2023, DINOv2).
      dropout: the rate after the embedding, attention and both layers of the MLP.
      attention_dropout: the rate of dropped attention weights.
      scan: whether blocks are one loop over stacked parameters. unroll: the number of blocks in
        one turn of that loop in training; 0 is all of them; "auto" is 0 on a single CPU, else 1.
      remat: "none", "full" or the name of a checkpoint policy: what the backward pass computes
        again instead of keeping.
      attention: "auto", "xla", "heads_first", "cudnn" or "splash"; the numbers are the same (see
        `layers.attention.attend`).
      dtype: the dtype of computation. residual_dtype: the dtype of the stream between blocks; None
        means `dtype`. Parameters are float32 either way.
      initialization: the scheme of the initial values: "vision_transformer", "big_vision", "deit"
        or "flax"; see `layers.initialization`.
    """

    width: int
    depth: int
    num_heads: int
    mlp_dim: int | None = None
    num_kv_heads: int | None = None
    norm: str = "layernorm"
    norm_epsilon: float = NORM_EPSILON
    mlp: str = "gelu"
    activation: str = "gelu_tanh"
    qkv_bias: bool = True
    key_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    differential: bool = False
    parallel: bool = False
    attention_norm: bool = False
    mlp_norm: bool = False
    post_norm: bool = False
    layer_scale: float | None = None
    mlp_layer_scale: bool = True
    rope_interleaved: bool = False
    drop_path: float = 0.0
    constant_drop_path: bool = False
    drop_path_exact: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan: bool = True
    unroll: int | str = "auto"
    remat: str = "none"
    attention: str = "auto"
    dtype: DTypeLike = "float32"
    residual_dtype: DTypeLike | None = None
    initialization: str = "vision_transformer"

    @nn.nowrap
    def block_spec(self, **fields: Any) -> BlockSpec:
        """Returns the spec of the blocks, with `fields` replaced. Raises `UserError`."""
        given = {name: getattr(self, name) for name in _BLOCK_FIELDS}
        given["dtype"] = float_dtype("dtype", self.dtype)
        residual = self.residual_dtype or self.dtype
        given["residual_dtype"] = float_dtype("residual_dtype", residual)
        return BlockSpec.create(**{"width": self.width} | given | fields)

    @nn.nowrap
    def stack_spec(self) -> StackSpec:
        """Returns how the blocks are stacked. Raises `UserError`."""
        return StackSpec(**{name: getattr(self, name) for name in _STACK_FIELDS})


def _names_of(spec: type) -> frozenset[str]:
    """Returns the fields that an encoder and a spec have in common."""
    mine, theirs = map(dataclasses.fields, (Encoder, spec))
    return frozenset(f.name for f in mine) & frozenset(f.name for f in theirs)


_BLOCK_FIELDS, _STACK_FIELDS = _names_of(BlockSpec), _names_of(StackSpec)
