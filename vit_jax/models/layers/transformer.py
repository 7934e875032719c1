"""The pre-norm transformer encoder that the vision and text towers share."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vit_jax.errors import UserError
from vit_jax.models.layers.attention import (
    IMPLEMENTATIONS,
    Attention,
    SegmentIds,
    check_heads,
    on_single_cpu,
)
from vit_jax.models.layers.basic import (
    ACTIVATIONS,
    MLPS,
    NORM_EPSILON,
    NORMS,
    Mlp,
    check_choice,
    check_least,
    check_rate,
    drop_exact_share,
    drop_path,
    layer_scale,
    make_norm,
)
from vit_jax.models.layers.initialization import SCHEMES, with_axes
from vit_jax.models.layers.position_bias import PositionBiasSpec
from vit_jax.models.layers.windows import Windows
from vit_jax.types import Array, Params

REMAT_POLICIES: Mapping[str, Callable[..., Any]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMATS = ("none", *REMAT_POLICIES)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """The layers of one transformer block.

    The fields are those of `layers.encoder.Encoder`, except:

    head_dim: the width of one head. attention: the implementation.
    dtype: the dtype of matrix products. residual_dtype: the dtype of the stream that blocks add to.
    rope: None, "fixed" (angles come with the call) or "mixed" (every layer learns its frequencies).
    positions: whether every block adds learned positions to its input (Fang et al. 2021, YOLOS).
    """

    num_heads: int
    head_dim: int
    mlp_dim: int
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
    attention_norm: bool = False
    mlp_norm: bool = False
    differential: bool = False
    parallel: bool = False
    post_norm: bool = False
    layer_scale: float | None = None
    mlp_layer_scale: bool = True
    rope: str | None = None
    rope_interleaved: bool = False
    position_bias: PositionBiasSpec | None = None
    positions: bool = False
    drop_path_exact: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: str = "auto"
    dtype: DTypeLike = jnp.float32
    residual_dtype: DTypeLike = jnp.float32
    initialization: str = "vision_transformer"

    @classmethod
    def create(
        cls, *, width: int, num_heads: int, mlp_dim: int | None, **fields: Any
    ) -> "BlockSpec":
        """Returns a checked spec; `mlp_dim` None is four times the width. Raises `UserError`."""
        spec = cls(
            num_heads=num_heads,
            head_dim=check_heads(width, num_heads),
            mlp_dim=mlp_dim or 4 * width,
            **fields,
        )
        check_least(1, mlp_dim=spec.mlp_dim)
        check_choice("norm", spec.norm, NORMS)
        check_choice("mlp", spec.mlp, MLPS)
        check_choice("activation", spec.activation, ACTIVATIONS)
        if spec.norm_epsilon <= 0.0:
            raise UserError(f"norm_epsilon={spec.norm_epsilon}: write a number above 0, say 1e-6")
        if spec.differential and (spec.rope or spec.head_dim % 2 or spec.num_kv_heads):
            raise UserError(
                "differential attention needs heads of an even width, as many keys as queries, and"
                " no rotary positions; write differential=False"
            )
        if spec.parallel and spec.post_norm:
            raise UserError("parallel blocks norm once, before; write post_norm=False")
        if spec.num_kv_heads is not None:
            check_least(1, num_kv_heads=spec.num_kv_heads)
            if num_heads % spec.num_kv_heads:
                raise UserError(
                    f"num_kv_heads={spec.num_kv_heads} does not divide num_heads={num_heads}"
                )
        check_choice("attention", spec.attention, IMPLEMENTATIONS)
        check_choice("initialization", spec.initialization, tuple(SCHEMES))
        check_rate("dropout", spec.dropout)
        check_rate("attention_dropout", spec.attention_dropout)
        if spec.attention_dropout and spec.attention in ("cudnn", "splash"):
            raise UserError(
                f"attention={spec.attention!r} cannot drop attention weights; "
                "write attention='xla' or attention_dropout=0"
            )
        return spec

    def make_attention(self, *, train: bool, name: str, rope: str | None = None) -> Attention:
        """Returns the attention layer of this spec."""
        return Attention(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            implementation=self.attention,
            norm=self.norm,
            qk_norm=self.qk_norm,
            rope=rope,
            rope_interleaved=self.rope_interleaved,
            dropout=self.attention_dropout,
            train=train,
            initialization=self.initialization,
            qkv_bias=self.qkv_bias,
            key_bias=self.key_bias,
            proj_bias=self.proj_bias,
            out_norm=self.attention_norm,
            norm_epsilon=self.norm_epsilon,
            num_kv_heads=self.num_kv_heads,
            position_bias=self.position_bias,
            differential=self.differential,
            name=name,
        )

    def make_mlp(self, *, train: bool, name: str) -> Mlp:
        """Returns the MLP of this spec."""
        return Mlp(
            self.mlp_dim,
            self.mlp,
            self.dropout,
            train,
            self.dtype,
            self.initialization,
            activation=self.activation,
            use_bias=self.mlp_bias,
            norm=self.norm if self.mlp_norm else None,
            norm_epsilon=self.norm_epsilon,
            name=name,
        )

    def make_norm(self, name: str) -> nn.Module:
        """Returns a norm over the width of this spec."""
        return make_norm(self.norm, name=name, dtype=self.dtype, epsilon=self.norm_epsilon)


class Block(nn.Module):
    """One pre-norm block: x += attention(norm1(x)); x += mlp(norm2(x)).

    With `post_norm`: x += norm1(attention(x)); x += norm2(mlp(x)) (Liu et al. 2022, Swin V2).

    windows: within which it attends; None: to all tokens.
    """

    spec: BlockSpec
    train: bool
    windows: Windows | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        drop_rate: Array | None,
        rope: Array | None,
        segment_ids: SegmentIds | None,
        bias: Array | None = None,
    ) -> tuple[Array, None]:
        """Maps x `[batch, tokens, embed]` to (x, None), the pair that `nn.scan` expects."""
        spec = self.spec
        if spec.positions:
            init = with_axes(nn.initializers.zeros, (None, "tokens", "embed"))
            x = x + self.param("positions", init, (1, *x.shape[1:]), jnp.float32).astype(x.dtype)
        attention = spec.make_attention(train=self.train, name="attn", rope=spec.rope)
        mlp = spec.make_mlp(train=self.train, name="mlp")
        norm1 = spec.make_norm("norm1")
        y = x if spec.post_norm else norm1(x)
        attended = attention(y, rope=rope, segment_ids=segment_ids, windows=self.windows, bias=bias)
        attended = nn.Dropout(spec.dropout, deterministic=not self.train)(attended)
        if spec.parallel:
            return self._add(x, attended + mlp(y), "scale1", drop_rate), None
        norm2 = spec.make_norm("norm2")
        if spec.post_norm:
            x = self._add(x, norm1(attended), "scale1", drop_rate)
            return self._add(x, norm2(mlp(x)), "scale2", drop_rate), None
        x = self._add(x, attended, "scale1", drop_rate)
        return self._add(x, mlp(norm2(x)), "scale2", drop_rate), None

    @nn.nowrap
    def _add(self, x: Array, branch: Array, scale: str, drop_rate: Array | None) -> Array:
        if self.spec.layer_scale is not None and (scale == "scale1" or self.spec.mlp_layer_scale):
            branch = layer_scale(self, scale, branch, self.spec.layer_scale)
        if drop_rate is not None:
            drop = drop_exact_share if self.spec.drop_path_exact else drop_path
            branch = drop(branch, drop_rate, self.make_rng("dropout"))
        x = x + branch.astype(x.dtype)
        return nn.with_logical_constraint(x, ("batch", "tokens", "embed"))


@dataclasses.dataclass(frozen=True)
class StackSpec:
    """The way in which a stack of blocks is built and run.

    drop_path: the rate of the last block; it grows linearly from 0 at the first block, or is the
    same for all blocks with `constant_drop_path`.
    scan: one compiled block looped over stacked parameters, so that compile time does not grow with
    depth. unroll: blocks in one turn of that loop in training; 0 makes straight code of all blocks,
    which still traces one block, and runs faster on CPUs and where blocks are small; "auto" is 0 on
    a single CPU and 1 elsewhere.
    remat: what the backward pass recomputes, "none" or a key of `REMAT_POLICIES`.
    """

    depth: int
    drop_path: float = 0.0
    scan: bool = True
    unroll: int | str = "auto"
    remat: str = "none"
    constant_drop_path: bool = False

    def __post_init__(self) -> None:
        check_least(0, depth=self.depth)
        check_unroll(self.unroll)
        check_choice("remat", self.remat, REMATS)
        check_rate("drop_path", self.drop_path)


def check_unroll(unroll: int | str) -> None:
    """Raises `UserError` unless `unroll` is "auto" or a number of blocks."""
    is_valid = isinstance(unroll, int) and not isinstance(unroll, bool) and unroll >= 0
    if unroll != "auto" and not is_valid:
        raise UserError(f"unroll={unroll!r}: write 0 or more, or 'auto'")


def run_blocks(
    x: Array,
    spec: BlockSpec,
    stack: StackSpec,
    *,
    train: bool,
    rope: Array | None = None,
    segment_ids: SegmentIds | None = None,
    windows: Sequence[Windows | None] = (),
    bias: Array | None = None,
) -> Array:
    """Applies `stack.depth` blocks to `[batch, tokens, embed]`, inside a compact method.

    The calling module gets the parameters `blocks` (stacked, leading axis "layers") or, without
    scan, `blocks_0`, `blocks_1`, ...

    windows: of each block, without scan; empty where all blocks attend to all tokens.
    bias: of the attention logits of all blocks alike, float32 `[1, heads, tokens, tokens]`.
    """
    x = nn.with_logical_constraint(x.astype(spec.residual_dtype), ("batch", "tokens", "embed"))
    shared, own = (rope, segment_ids, bias), [(one,) for one in windows]
    return scan_or_unroll(Block, (spec, train), x, stack, shared, own=own, train=train)


def padding_segments(counts: Array | None, num_prefix: int = 0) -> SegmentIds | None:
    """Returns segments that keep padding apart from the tokens that count.

    counts: bool `[batch, tokens]`, of the tokens after the first `num_prefix`, which all count;
    None where there is no padding.
    """
    if counts is None:
        return None
    segments = jnp.pad(~counts, ((0, 0), (num_prefix, 0))).astype(jnp.int32)
    return segments, segments


def scan_or_unroll(
    block: type[nn.Module],
    fields: tuple[Any, ...],
    x: Array,
    stack: StackSpec,
    shared: tuple[Any, ...] = (),
    *,
    own: Sequence[tuple[Any, ...]] = (),
    train: bool,
) -> Array:
    """Runs `block(*fields)(x, drop_rate, *shared)`, which returns (x, None), for every layer.

    own: further fields of each layer's block; without scan only.
    """
    unroll = (0 if on_single_cpu() else 1) if stack.unroll == "auto" else int(stack.unroll)
    if stack.remat != "none":
        # Inside a loop XLA cannot merge the recomputation with the forward pass anyway.
        is_loop = stack.scan and unroll == 1
        block = nn.remat(block, policy=REMAT_POLICIES[stack.remat], prevent_cse=not is_loop)
    rates = None
    if train and stack.drop_path:
        growth = jnp.arange(stack.depth) / max(stack.depth - 1, 1)
        rates = stack.drop_path * (jnp.ones(stack.depth) if stack.constant_drop_path else growth)
    if not stack.scan:
        for i in range(stack.depth):
            rate = None if rates is None else rates[i]
            further = own[i] if own else ()
            x, _ = block(*fields, *further, name=f"blocks_{i}")(x, rate, *shared)
        return x
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *(nn.broadcast for _ in shared)),
        length=stack.depth,
        unroll=(unroll or stack.depth) if train else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x, _ = scanned(*fields, name="blocks")(x, rates, *shared)
    return x


def unstack_blocks(params: Params) -> dict[str, Any]:
    """Returns parameters as a model without scan has them: `blocks` → `blocks_0`, ..."""
    out: dict[str, Any] = {}
    for key, value in params.items():
        if key == "blocks":
            depth = len(jax.tree.leaves(value)[0])
            for i in range(depth):
                out[f"blocks_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
        else:
            out[key] = unstack_blocks(value) if isinstance(value, Mapping) else value
    return out


def stack_blocks(params: Params) -> dict[str, Any]:
    """Inverts `unstack_blocks`: `blocks_0`, `blocks_1`, ... → `blocks`."""
    out: dict[str, Any] = {}
    numbered: dict[int, Any] = {}
    for key, value in params.items():
        match = re.fullmatch(r"blocks_(\d+)", key)
        if match:
            numbered[int(match[1])] = value
        else:
            out[key] = stack_blocks(value) if isinstance(value, Mapping) else value
    if numbered:
        out["blocks"] = jax.tree.map(_stack, *(numbered[i] for i in range(len(numbered))))
    return out


def _stack(*leaves: Array | np.ndarray) -> Array | np.ndarray:
    # Checkpoints on the host stay there.
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)
