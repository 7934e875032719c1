"""MLP-Mixer (Tolstikhin et al. 2021): MLPs that mix tokens, then channels, and no attention.

patch_embed/{kernel,bias}    [patch_h, patch_w, channels, width], [width]
blocks/                      leading axis depth; blocks_0/, ... with scan=False
  norm1, norm2/{scale,bias}  [width]
  token_mixing/dense1/{kernel,bias}  [tokens, tokens_mlp_dim], ...
  token_mixing/dense2/{kernel,bias}  [tokens_mlp_dim, tokens], ...
  channel_mixing/dense1, dense2      as a ViT's mlp
  scale1, scale2             [width]  (layer_scale)
norm/{scale,bias}            [width]
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.layers.basic import (
    ACTIVATIONS,
    Linear,
    Mlp,
    PatchEmbed,
    check_choice,
    check_least,
    check_patch,
    check_rate,
    cut_patches,
    drop_path,
    layer_scale,
    lift,
    make_norm,
    pair,
)
from vit_jax.models.layers.initialization import SCHEMES, with_axes
from vit_jax.models.layers.transformer import StackSpec, scan_or_unroll
from vit_jax.models.registry import Variant
from vit_jax.models.traits import VIT_NAMES, Traits, named_fields
from vit_jax.plugins import float_dtype
from vit_jax.types import Array, Features

INITIALIZATION = "flax"
"""The scheme of `layers.initialization` that both published codebases use for Mixers."""


class TokenMixing(nn.Module):
    """An MLP along the tokens of `[batch, tokens, width]`, the same for every channel.

    With `mlp_dim` 0 it is one linear map instead (Touvron et al. 2021, ResMLP).
    """

    mlp_dim: int
    dtype: DTypeLike
    activation: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inits: dict[str, Any] = {"dtype": self.dtype, "kernel_init": SCHEMES[INITIALIZATION].kernel}
        tokens = x.shape[1]
        x = jnp.swapaxes(x, 1, 2)
        into, out = ("tokens", "token_mixing"), ("token_mixing", "tokens")
        if not self.mlp_dim:
            mixed = Linear((tokens,), ("tokens", None), name="dense1", **inits)(x)
            return jnp.swapaxes(mixed, 1, 2)
        dense1 = Linear((self.mlp_dim,), into, name="dense1", **inits)
        dense2 = Linear((tokens,), out, name="dense2", **inits)
        hidden = ACTIVATIONS[self.activation](dense1(x))
        hidden = nn.with_logical_constraint(hidden, ("batch", "embed", "token_mixing"))
        return jnp.swapaxes(dense2(hidden), 1, 2)


class Affine(nn.Module):
    """A scale and a shift of every channel, with which ResMLP replaces norms."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ones = with_axes(nn.initializers.ones, ("embed",))
        zeros = with_axes(nn.initializers.zeros, ("embed",))
        scale = self.param("scale", ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", zeros, (x.shape[-1],), jnp.float32)
        scale, bias = (lift(value.astype(self.dtype), x.ndim) for value in (scale, bias))
        return x.astype(self.dtype) * scale + bias


def _make_norm(kind: str, name: str, dtype: DTypeLike) -> nn.Module:
    return Affine(dtype, name=name) if kind == "affine" else make_norm(kind, name=name, dtype=dtype)


class MixerBlock(nn.Module):
    """x += token_mixing(norm1(x)); x += channel_mixing(norm2(x))."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    dropout: float
    dtype: DTypeLike
    train: bool
    activation: str
    norm: str
    layer_scale: float | None

    @nn.compact
    def __call__(self, x: Array, drop_rate: Array | None) -> tuple[Array, None]:
        norm1 = _make_norm(self.norm, "norm1", self.dtype)
        fields = (self.tokens_mlp_dim, self.dtype, self.activation)
        mixed = TokenMixing(*fields, name="token_mixing")(norm1(x))
        x = self._add(x, mixed, drop_rate, "scale1")
        norm2 = _make_norm(self.norm, "norm2", self.dtype)
        mlp = Mlp(
            self.channels_mlp_dim,
            "gelu",
            self.dropout,
            self.train,
            self.dtype,
            INITIALIZATION,
            activation=self.activation,
            name="channel_mixing",
        )
        return self._add(x, mlp(norm2(x)), drop_rate, "scale2"), None

    @nn.nowrap
    def _add(self, x: Array, branch: Array, drop_rate: Array | None, scale: str) -> Array:
        if self.layer_scale is not None:
            branch = layer_scale(self, scale, branch, self.layer_scale)
        branch = nn.Dropout(self.dropout, deterministic=not self.train)(branch)
        if drop_rate is not None:
            branch = drop_path(branch, drop_rate, self.make_rng("dropout"))
        return nn.with_logical_constraint(x + branch, ("batch", "tokens", "embed"))


class Mixer(nn.Module):
    """An MLP-Mixer backbone; works at the image size it was initialised with.

    Attributes:
      patch_size: side of a patch, or (height, width). Images are padded to whole patches, evenly on
        both sides (a SAME convolution), unlike a ViT's, which are cropped.
      tokens_mlp_dim, channels_mlp_dim: hidden widths of the two kinds of mixing; tokens_mlp_dim 0
        mixes tokens by one linear map (Touvron et al. 2021, ResMLP).
      activation: as in `VisionTransformer`. norm: "layernorm", or "affine" for ResMLP's scale and
        shift. layer_scale: as in `VisionTransformer`.
      drop_path, dropout, scan, unroll, remat, dtype: as in `VisionTransformer`.
    """

    patch_size: int | Sequence[int]
    width: int
    depth: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    activation: str = "gelu_tanh"
    norm: str = "layernorm"
    layer_scale: float | None = None
    drop_path: float = 0.0
    dropout: float = 0.0
    scan: bool = True
    unroll: int | str = "auto"
    remat: str = "none"
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        check_patch(self.patch_size)
        check_least(1, width=self.width, channels_mlp_dim=self.channels_mlp_dim)
        check_least(0, tokens_mlp_dim=self.tokens_mlp_dim)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, ("layernorm", "affine"))
        check_rate("dropout", self.dropout)
        float_dtype("dtype", self.dtype)
        self.stack_spec()
        super().__post_init__()

    @nn.nowrap
    def stack_spec(self) -> StackSpec:
        """Returns how the blocks are stacked."""
        return StackSpec(self.depth, self.drop_path, self.scan, self.unroll, self.remat)

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        names = {
            "activation": VIT_NAMES["activation"],
            "norm": {"layernorm": "", "affine": "scale and shift for norms"},
            "layer_scale": "LayerScale",
        }
        named = named_fields(self, Mixer, names)
        if not self.tokens_mlp_dim:
            named.add("linear token mixing")
        return Traits("a Mixer", frozenset(named))

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Features:
        """Encodes images, float `[batch, height, width, channels]`."""
        dtype, patch = jnp.dtype(self.dtype), pair(self.patch_size)
        patches = cut_patches(_pad_to_patches(images, patch), patch)
        batch, rows, columns, _ = patches.shape
        embed = PatchEmbed(patch, images.shape[-1], self.width, dtype, name="patch_embed")
        x = embed(patches.reshape(batch, rows * columns, -1))
        dims = (self.tokens_mlp_dim, self.channels_mlp_dim)
        fields = (*dims, self.dropout, dtype, train, self.activation, self.norm, self.layer_scale)
        x = scan_or_unroll(MixerBlock, fields, x, self.stack_spec(), train=train)
        x = _make_norm(self.norm, "norm", dtype)(x)
        grid = x.reshape(batch, rows, columns, self.width)
        pooled = jnp.mean(x, axis=1, dtype=jnp.float32)
        return Features(grid=grid, pooled=pooled, stages=(grid,))


def _pad_to_patches(images: Array, patch: tuple[int, int]) -> Array:
    sides = images.shape[1:3]
    padding = jax.lax.padtype_to_pads(sides, patch, patch, "SAME")
    return jnp.pad(images, [(0, 0), *padding, (0, 0)])


def _variant(patch: int, width: int, depth: int, tokens_mlp_dim: int) -> Variant:
    fields = {"patch_size": patch, "width": width, "depth": depth}
    mlps = {"tokens_mlp_dim": tokens_mlp_dim, "channels_mlp_dim": 4 * width}
    return Variant(Mixer, fields | mlps)


# Table 1 of the paper.
VARIANTS = {
    "mixer_s32": _variant(32, 512, 8, 256),
    "mixer_s16": _variant(16, 512, 8, 256),
    "mixer_s8": _variant(8, 512, 8, 256),
    "mixer_b32": _variant(32, 768, 12, 384),
    "mixer_b16": _variant(16, 768, 12, 384),
    "mixer_l32": _variant(32, 1024, 24, 512),
    "mixer_l16": _variant(16, 1024, 24, 512),
    "mixer_h14": _variant(14, 1280, 32, 640),
}
