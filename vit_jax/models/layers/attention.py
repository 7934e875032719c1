"""Multi-head attention, and the one place where its implementation is chosen.

Every implementation computes the same numbers up to rounding: the queries are scaled by
1/sqrt(head_dim), and logits and softmax are float32. Only the explicit one can return the weights
or drop some of them.

Logits have no soft cap, because `qk_norm` bounds them already, no released ViT was trained with a
cap, and JAX's interface to cuDNN's kernel takes none.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from vit_jax.errors import UserError
from vit_jax.models.layers.basic import NORM_EPSILON, Linear, check_least, make_norm
from vit_jax.models.layers.differential import Difference
from vit_jax.models.layers.initialization import SCHEMES
from vit_jax.models.layers.position_bias import PositionBiasSpec
from vit_jax.models.layers.positions import MixedFrequencies, rotate
from vit_jax.models.layers.windows import Windows
from vit_jax.types import Array

IMPLEMENTATIONS = ("auto", "xla", "heads_first", "cudnn", "splash")

# Splash attention works on tiles of 128 lanes; sequences are padded up to it.
SPLASH_TILE = 128
SPLASH_BLOCK = 512

SegmentIds = tuple[Array, Array]


class Attention(nn.Module):
    """Multi-head attention of `[batch, queries, embed]` to `[batch, keys, embed]`.

    Parameters: query, key, value `[width, heads, head_dim]` and out `[heads, head_dim, width]`,
    with biases unless told otherwise; `query_norm` and `key_norm` over head_dim with `qk_norm`
    (Dehghani et al. 2023, ViT-22B); `norm` over all heads before out with `out_norm` (Wang et al.
    2022, Magneto); `rope_frequencies` with rope="mixed"; `position_bias`, see there.

    With `differential`, queries and keys have twice as many heads of half the width, and
    `difference` has parameters of its own; see `layers.differential`.

    With `num_kv_heads`, keys and values have fewer heads, each of which serves several heads of the
    queries (Ainslie et al. 2023, GQA).

    The weights `[batch, heads, queries, keys]` are sown as intermediates/attention when the caller
    makes that collection mutable; they are then computed explicitly, whatever `implementation` is.
    """

    num_heads: int
    head_dim: int
    dtype: DTypeLike
    implementation: str = "auto"
    norm: str = "layernorm"
    qk_norm: bool = False
    rope: str | None = None
    rope_interleaved: bool = False
    dropout: float = 0.0
    train: bool = False
    initialization: str = "vision_transformer"
    qkv_bias: bool = True
    key_bias: bool = True
    proj_bias: bool = True
    out_norm: bool = False
    norm_epsilon: float = NORM_EPSILON
    num_kv_heads: int | None = None
    position_bias: PositionBiasSpec | None = None
    differential: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        keys: Array | None = None,
        *,
        rope: Array | None = None,
        segment_ids: SegmentIds | None = None,
        windows: Windows | None = None,
        bias: Array | None = None,
    ) -> Array:
        """Attends from `x` to `keys`, or to `x` itself when `keys` is None.

        Args:
          rope: rotation angles `[(batch,) tokens, 1, head_dim / 2]`, or for mixed frequencies the
            coordinates `[(batch,) tokens, 2]`.
          segment_ids: int32 `[batch, queries]` and `[batch, keys]`; a query attends to the keys
            that have its own number.
          windows: each token attends to those of its own window alone; not with segment_ids.
          bias: float32 `[batch or 1, heads, queries, keys]`, added to the logits.
        """
        keys = x if keys is None else keys
        kv_heads = self.num_kv_heads or self.num_heads
        maps = 2 if self.differential else 1
        query = self._project("query", x, maps * self.num_heads, self.qkv_bias)
        key = self._project("key", keys, maps * kv_heads, self.qkv_bias and self.key_bias)
        value = self._project("value", keys, kv_heads, self.qkv_bias)
        if self.qk_norm:
            # No bias: softmax would not see the key's, and ViT-22B has none.
            query = self._norm("query_norm", "head_dim", use_bias=False)(query)
            key = self._norm("key_norm", "head_dim", use_bias=False)(key)
        if rope is not None:
            if self.rope == "mixed":
                rope = MixedFrequencies(self.num_heads, self.head_dim, name="rope")(rope)
            turn = partial(rotate, angles=rope, interleaved=self.rope_interleaved)
            query, key = turn(query), turn(key)
        if kv_heads != self.num_heads:
            key, value = (jnp.repeat(x, self.num_heads // kv_heads, axis=2) for x in (key, value))
        if self.position_bias is not None:
            bias = self.position_bias.make(self.num_heads, name="position_bias")()
        if windows is None:
            y = self._attend(query, key, value, segment_ids, bias=bias)
        else:
            apart = windows.segment_ids(x.shape[0])
            own = [windows.split(part) for part in (query, key, value)]
            y = windows.join(self._attend(own[0], own[1], own[2], apart, windows=windows))
        y = nn.with_logical_constraint(y, ("batch", "tokens", "heads", "head_dim"))
        if self.out_norm:
            y = self._norm("norm", ("heads", "head_dim"))(y)
        out = Linear(
            (x.shape[-1],),
            ("heads", "head_dim", "embed"),
            num_in=2,
            dtype=self.dtype,
            kernel_init=SCHEMES[self.initialization].kernel,
            use_bias=self.proj_bias,
            name="out",
        )
        return out(y)

    @nn.nowrap
    def _norm(self, name: str, axis: str | tuple[str, ...], *, use_bias: bool = True) -> nn.Module:
        fields: dict[str, Any] = {"dtype": self.dtype, "epsilon": self.norm_epsilon}
        return make_norm(self.norm, name=name, axis=axis, use_bias=use_bias, **fields)

    @nn.nowrap
    def _project(self, name: str, x: Array, num_heads: int, use_bias: bool) -> Array:
        differs = self.differential and name != "value"
        features = (num_heads, self.head_dim // 2 if differs else self.head_dim)
        axes = ("embed", "heads", "head_dim")
        init = SCHEMES[self.initialization].kernel
        y = Linear(
            features, axes, dtype=self.dtype, name=name, kernel_init=init, use_bias=use_bias
        )(x)
        return nn.with_logical_constraint(y, ("batch", "tokens", "heads", "head_dim"))

    @nn.nowrap
    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        segment_ids: SegmentIds | None,
        *,
        windows: Windows | None = None,
        bias: Array | None = None,
    ) -> Array:
        asked_for = self.is_mutable_collection("intermediates") and not self.is_initializing()
        dropping = self.train and self.dropout > 0.0
        if not asked_for and not dropping and not self.differential:
            how = self.implementation
            return attend(query, key, value, segment_ids, bias=bias, implementation=how)
        weights = attention_weights(query, key, segment_ids, bias)
        if self.differential:
            difference = Difference(self.head_dim, self.dtype, name="difference")
            weights = difference.weights(weights)
        if asked_for:
            self.sow("intermediates", "attention", windows.whole(weights) if windows else weights)
        weights = nn.Dropout(self.dropout, deterministic=not self.train)(weights)
        y = weighted_sum(weights, value)
        return difference.normed(y) if self.differential else y


def attend(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: SegmentIds | None = None,
    *,
    bias: Array | None = None,
    implementation: str = "auto",
) -> Array:
    """Applies softmax attention of query `[b, q, h, d]` to key and value `[b, k, h, d]`.

    Args:
      segment_ids: int32 `[b, q]` and `[b, k]`; a query attends to keys with its own number.
      bias: float32 `[b or 1, h, q, k]`, added to the logits; `heads_first` and `splash` take none.
      implementation: `xla` multiplies explicitly. `heads_first` does the same with another order of
        axes and a backward pass of its own, which is faster on CPUs. `cudnn` is the fused kernel of
        NVIDIA GPUs, for float16 and bfloat16. `splash` is the Pallas kernel of TPUs, interpreted
        elsewhere. `auto` takes cudnn where it runs, heads_first on a single CPU, and xla elsewhere:
        ViT sequences are short enough that XLA's own fusion serves TPUs well.

    Returns:
      `[b, q, h, d]` in the dtype of the values.
    """
    if implementation == "auto":
        implementation = _fastest(query, key, segment_ids, bias)
    if implementation == "splash" and bias is not None:
        raise UserError("attention='splash' takes no position bias; write attention='auto'")
    if implementation == "cudnn":
        if not _cudnn_runs(query):
            raise UserError(
                "attention='cudnn' needs an NVIDIA GPU, dtype bfloat16 or float16, and heads whose "
                "width is a multiple of 8 up to 128; write attention='auto'"
            )
        if not _cudnn_masks(query, key, segment_ids, bias):
            raise UserError(
                f"attention='cudnn' cannot train where {query.shape[1]} tokens see a part of"
                f" {key.shape[1]}: a masked length must be even; write attention='auto'"
            )
        mask = None if segment_ids is None else _same_segment(segment_ids)
        if bias is not None:
            bias = bias.astype(query.dtype)
        return jax.nn.dot_product_attention(
            query, key, value, bias=bias, mask=mask, implementation="cudnn"
        )
    if implementation == "splash":
        return _splash(query, key, value, segment_ids)
    if implementation == "heads_first" and bias is None:
        return _heads_first(query, key, value, segment_ids)
    return weighted_sum(attention_weights(query, key, segment_ids, bias), value)


def on_single_cpu() -> bool:
    """Returns whether the program being traced is for a mesh of one CPU.

    Without a mesh in context the answer is no. The mesh is asked, not the machine, because a CPU
    may be compiling for other devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size > 1:
        return False
    return getattr(mesh.abstract_device, "platform", None) == "cpu"


def _fastest(query: Array, key: Array, segment_ids: SegmentIds | None, bias: Array | None) -> str:
    if _cudnn_runs(query) and _cudnn_masks(query, key, segment_ids, bias):
        return "cudnn"
    return "heads_first" if on_single_cpu() else "xla"


def attention_weights(
    query: Array,
    key: Array,
    segment_ids: SegmentIds | None = None,
    bias: Array | None = None,
) -> Array:
    """Returns softmax weights, float32 `[b, h, q, k]`; every query needs a key of its segment."""
    # The query is smaller than the logits, and cheaper to scale.
    query = query / math.sqrt(query.shape[-1])
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    return _softmax(logits if bias is None else logits + bias, segment_ids)


def weighted_sum(weights: Array, value: Array) -> Array:
    """Returns `[b, q, h, d]`: the values `[b, k, h, d]`, summed with weights `[b, h, q, k]`."""
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


def _softmax(logits: Array, segment_ids: SegmentIds | None) -> Array:
    """Normalizes logits `[b, h, q, k]` over the keys of each query's own segment."""
    if segment_ids is not None:
        logits = jnp.where(_same_segment(segment_ids), logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def _same_segment(segment_ids: SegmentIds) -> Array:
    queries, keys = segment_ids
    return queries[:, None, :, None] == keys[:, None, None, :]


def _heads_first(query: Array, key: Array, value: Array, segment_ids: SegmentIds | None) -> Array:
    query = query / math.sqrt(query.shape[-1])
    swapped = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(_of_heads(*swapped, segment_ids), 1, 2)


@jax.custom_vjp
def _of_heads(query: Array, key: Array, value: Array, segment_ids: SegmentIds | None) -> Array:
    """Applies attention of scaled queries `[b, h, q, d]` to keys and values `[b, h, k, d]`.

    The `xla` implementation lays out the weighted sum and its gradients with the last two axes
    exchanged, and its backward pass reads the weights once more.
    """
    return _of_heads_forward(query, key, value, segment_ids)[0]


def _of_heads_forward(
    query: Array, key: Array, value: Array, segment_ids: SegmentIds | None
) -> tuple[Array, tuple]:
    weights = _softmax(_product(query, key, 3, 3), segment_ids)
    y = _product(weights.astype(value.dtype), value, 3, 2).astype(value.dtype)
    return y, (query, key, value, weights, y)


def _of_heads_backward(kept: tuple, dy: Array) -> tuple[Array | None, ...]:
    query, key, value, weights, y = kept
    dvalue = _product(weights.astype(dy.dtype), dy, 2, 2)
    dweights = _product(dy, value, 3, 3)
    # Softmax wants the sum of weights * dweights, which is that of y * dy: far fewer numbers
    # (Dao et al. 2022, FlashAttention, appendix B.2).
    total = jnp.sum(y.astype(jnp.float32) * dy, axis=-1, keepdims=True)
    dlogits = (weights * (dweights - total)).astype(key.dtype)
    dquery, dkey = _product(dlogits, key, 3, 2), _product(dlogits, query, 2, 2)
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_of_heads.defvjp(_of_heads_forward, _of_heads_backward)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Multiplies `[b, h, …]` arrays, summed over one axis of each, in float32."""
    dimensions = (((left_axis,), (right_axis,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _cudnn_runs(query: Array) -> bool:
    """Returns whether the fused GPU kernel takes this query.

    It needs half precision and a head_dim that is a multiple of 8 up to 128.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    head_dim = query.shape[-1]
    return jax.default_backend() == "gpu" and half and head_dim % 8 == 0 and head_dim <= 128


def _cudnn_masks(
    query: Array, key: Array, segment_ids: SegmentIds | None, bias: Array | None = None
) -> bool:
    """Returns whether cuDNN can train with segments or with a bias at these lengths.

    A mask is a bias in cuDNN, and the gradient of a bias needs even lengths. Inference would not
    need them, but does not get a rule of its own.
    """
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    return even or (segment_ids is None and bias is None)


def _splash(query: Array, key: Array, value: Array, segment_ids: SegmentIds | None) -> Array:
    """Runs splash attention once per shard of the mesh: XLA cannot partition a Pallas kernel."""
    num_queries = query.shape[1]
    if segment_ids is None:
        segment_ids = jnp.zeros(query.shape[:2], jnp.int32), jnp.zeros(key.shape[:2], jnp.int32)
    # Softmax in the kernel is over plain products: the scale goes in with the query.
    query = query / math.sqrt(query.shape[-1])
    query, key, value = (_pad_tokens(x, 0) for x in (query, key, value))
    # -1 is nobody's segment, so padding is seen by padding alone.
    query_ids, key_ids = (_pad_tokens(ids, -1) for ids in segment_ids)
    kernel = _splash_on_one_shard
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        tokens = _dividing(("batch", None, "heads", None), query.shape, mesh)
        ids = _dividing(("batch", None), query_ids.shape, mesh)
        kernel = jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, ids, ids),
            out_specs=tokens,
            check_vma=False,
        )
    return kernel(query, key, value, query_ids, key_ids)[:, :num_queries]


def _dividing(
    names: Sequence[str | None], shape: Sequence[int], mesh: jax.sharding.AbstractMesh
) -> P:
    """Returns the mesh axes of logical names, less those that do not divide their dimension."""

    def ways(axes: str | tuple[str, ...]) -> int:
        return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))

    spec = nn.logical_to_mesh_axes(names)
    assert spec is not None
    split = (
        axes if axes and n % ways(axes) == 0 else None for axes, n in zip(spec, shape, strict=True)
    )
    return P(*split)


def _pad_tokens(x: Array, value: int) -> Array:
    missing = -x.shape[1] % SPLASH_TILE
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)


def _splash_on_one_shard(
    query: Array, key: Array, value: Array, query_ids: Array, key_ids: Array
) -> Array:
    # Imported here: Pallas takes a second to load and few runs use it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    num_queries, num_heads = query.shape[1:3]
    num_keys = key.shape[1]
    mask = splash.MultiHeadMask([splash.FullMask((num_queries, num_keys))] * num_heads)
    block_q, block_kv = (_largest_block(n) for n in (num_queries, num_keys))
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )

    def run(interpret: bool, query: Array, key: Array, value: Array, *ids: Array) -> Array:
        kernel = splash.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        return jax.vmap(kernel)(query, key, value, segment_ids=splash.SegmentIds(*ids))

    # By the platform compiled for, not the one at hand: a CPU may be compiling for a TPU.
    heads_first = partial(jnp.swapaxes, axis1=1, axis2=2)
    y = jax.lax.platform_dependent(
        *map(heads_first, (query, key, value)),
        query_ids,
        key_ids,
        tpu=partial(run, False),
        default=partial(run, True),
    )
    return heads_first(y).astype(value.dtype)


def _largest_block(length: int) -> int:
    """Returns the largest multiple of the tile, up to `SPLASH_BLOCK`, that divides a length."""
    blocks = range(SPLASH_TILE, SPLASH_BLOCK + 1, SPLASH_TILE)
    return max(block for block in blocks if length % block == 0)


def check_heads(width: int, num_heads: int) -> int:
    """Returns the width of one head. Raises `UserError` when heads do not divide the width."""
    check_least(1, width=width, num_heads=num_heads)
    if width % num_heads:
        raise UserError(
            f"width={width} cannot be cut into num_heads={num_heads}; write a divisor of {width}"
        )
    return width // num_heads
