"""Vision Transformer (Dosovitskiy et al. 2021, "An image is worth 16x16 words").

The parameters of `VisionTransformer`, in the order they are used; L is depth, H heads, D head_dim,
P = rows * columns of the patch grid:

    patch_embed/kernel           [patch_h, patch_w, channels, width]
    patch_embed/bias             [width]
    pos_embed                    [1, P, width], or [1, 1 + P, width], the class token's row first
                                 (position="learned"; the row is there with class_token_position)
    cls                          [1, 1, width]
    distill, registers           [1, 1, width], [1, num_registers, width]
    blocks/                      every leaf with a leading axis L; with scan=False blocks_0/,
                                 blocks_1/, ... without it (see stack_blocks, unstack_blocks)
      norm1/{scale,bias}         [width]                  (rmsnorm has no bias)
      attn/{query,key,value}/kernel  [width, H, D]
      attn/{query,key,value}/bias    [H, D]
      attn/{query_norm,key_norm}/scale   [D]              (qk_norm)
      attn/rope/frequencies      [2, H, D / 2]            (position="rope_mixed"; row, column)
      attn/out/kernel            [H, D, width]
      attn/out/bias              [width]
      attn/difference/           see `layers.differential`
      attn/norm/{scale,bias}     [H, D]                   (attention_norm)
      attn/position_bias/        see `layers.position_bias`
      positions                  [1, tokens, width]       (block_positions)
      scale1, scale2             [width]                  (layer_scale; scale1 alone if parallel,
                                 or without mlp_layer_scale)
      norm2/{scale,bias}         [width]                  (absent if parallel)
      mlp/dense1/{kernel,bias}   [width, mlp_dim], [mlp_dim]
      mlp/gate/{kernel,bias}     as dense1                (mlp="swiglu")
      mlp/norm/{scale,bias}      [mlp_dim]                (mlp_norm)
      mlp/dense2/{kernel,bias}   [mlp_dim, width], [width]
    embed_norm/, pre_norm/, norm/, fc_norm/{scale,bias}   [width]  (of the patch embedding, before
                                 and after the blocks, and after pooling, where the model has them)
    map_head/                    pooling="map"
      probe                      [1, 1, width]
      attn/, norm/, mlp/         as in a block

In a `Classifier` this tree is `backbone`, and beside it is `head/{kernel,bias}` with, where
`representation_size` is set, `head/pre_logits/{kernel,bias}`; with `distill_token` there is also a
`head_distill/` like it.

Tokens are ordered: class token, distillation token, registers, patches row by row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.heads.classifier import MapHead
from vit_jax.models.layers.basic import (
    PatchEmbed,
    check_choice,
    check_least,
    check_patch,
    check_rate,
    cut_patches,
    lift,
    pair,
    random_patches,
    stored_shape,
)
from vit_jax.models.layers.encoder import Encoder
from vit_jax.models.layers.initialization import SCHEMES, with_axes
from vit_jax.models.layers.position_bias import PositionBiasSpec, check_bias
from vit_jax.models.layers.positions import (
    POSITIONS,
    check_position,
    grid_coordinates,
    rotary_angles,
    sincos_2d,
)
from vit_jax.models.layers.resize import resize_position_table
from vit_jax.models.layers.transformer import BlockSpec, padding_segments, run_blocks
from vit_jax.models.layers.windows import check_kept, check_windows, windows_of_blocks
from vit_jax.models.registry import Variant
from vit_jax.models.traits import VIT_NAMES, Traits, named_fields
from vit_jax.models.vit_sizes import SIZES
from vit_jax.types import Array, Features

POOLINGS = ("token", "mean", "token_mean", "map", "none")


class VisionTransformer(Encoder):
    """A ViT backbone for images of any size and shape; pixels that fill no patch are dropped.

    The fields of the blocks, and how they are run, are those of `layers.encoder.Encoder`. Depth 0
    leaves out the encoder with its positions and last norm.

    Attributes:
      patch_size: the side of a patch in pixels, or (height, width).
      patch_bias: whether the patch embedding has a bias; CLIP's has none. embed_norm: whether it
        has a norm (Fini et al. 2024, AIMv2).
      pre_norm: a norm of all tokens before the first block (Radford et al. 2021, CLIP).
      last_norm: a norm of all tokens after the last block. fc_norm: a norm of the pooled vector
        (timm's name; BEiT and EVA have it in place of the last norm).
      pooling: "token" takes the class token, "mean" averages the patches, "token_mean" joins the
        two (Oquab et al. 2023, DINOv2), "map" attends to the patches with a learned probe, "none"
        pools nothing. pool_prefix: "mean" and "map" read the tokens before the patches, too (Bolya
        et al. 2025, Perception Encoder).
      map_dim, map_heads, map_mlp_dim: sizes of the attention pooling, of its vector first; None is
        as in the blocks. map_mlp: whether it has an MLP; those of AIMv2 and CoCa have none.
      class_token: whether there is one; None adds it where pooling needs it.
      class_token_position: the learned table has a row for the class token, as in the ViT paper;
        False is the convention of big_vision, DeiT III and timm's `no_embed_class`.
      position: "learned", "sincos2d" (fixed; MoCo v3), "sincos2d_mae" (fixed; MAE, I-JEPA), "none",
        or rotary: "rope" (axial), "rope_dinov3" (centred and scaled to the image), "rope_mixed"
        (learned directions).
      position_table: a learned table of positions is added beside rotary ones (EVA-02).
      rope_base: the base of the fixed frequencies; None is 100, EVA-02 has 10,000.
      rope_grid: (rows, columns) of pre-training, onto which the places of other grids are scaled
        (EVA-02). rope_offset: added to the indices of rows and columns. rope_columns_first: the
        first half of a head's pairs turns with the column (Perception Encoder, for both).
      position_grid: (rows, columns) for which the learned table is kept; images of other grids have
        it interpolated (Caron et al. 2021, DINO). None keeps it for the images at hand.
      position_resize_offset, position_resize_antialias: how it is interpolated, see
        `layers.resize.cubic_resize_matrix`; DINO has 0.1, DINOv2 with registers 0 and antialiasing.
      position_bias: a bias of the attention logits by the offset of two patches, "table" (BEiT) or
        "mlp" (Swin V2), in every block, or one for all blocks with "shared_table" or "shared_mlp";
        see `layers.position_bias`. position_bias_dim: the width of that MLP.
      block_positions: every block adds learned positions of all tokens (Fang et al. 2021, YOLOS).
      distill_token: whether there is a second class token, whose head imitates a teacher (Touvron
        et al. 2021, DeiT, section 4). It has no row in the position table, because its own learned
        value can hold one.
      num_registers: the number of extra tokens that no head reads (Darcet et al. 2024).
      patch_drop: the share of patches left out of every training image (Liu et al. 2022); the
        features then have no grid.
      window: the side of the squares, in tokens, within which blocks attend, except for the blocks
        whose numbers are in `global_blocks` (Li et al. 2022, ViTDet: 14, and 4 global blocks); 0
        is attention to all tokens. Windows need scan=False and patches without other tokens. The
        parameters are the same.
    """

    patch_size: int | Sequence[int]
    patch_bias: bool = True
    embed_norm: bool = False
    pre_norm: bool = False
    last_norm: bool = True
    fc_norm: bool = False
    pooling: str = "token"
    pool_prefix: bool = False
    map_dim: int | None = None
    map_heads: int | None = None
    map_mlp_dim: int | None = None
    map_mlp: bool = True
    class_token: bool | None = None
    class_token_position: bool = True
    position: str = "learned"
    position_table: bool = False
    rope_base: float | None = None
    rope_grid: Sequence[int] | None = None
    rope_offset: float = 0.0
    rope_columns_first: bool = False
    position_grid: Sequence[int] | None = None
    position_resize_offset: float = 0.0
    position_resize_antialias: bool = False
    position_bias: str = "none"
    position_bias_dim: int = 128
    block_positions: bool = False
    distill_token: bool = False
    num_registers: int = 0
    patch_drop: float = 0.0
    window: int = 0
    global_blocks: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("position", self.position, POSITIONS)
        check_patch(self.patch_size)
        check_least(0, num_registers=self.num_registers)
        check_rate("patch_drop", self.patch_drop)
        check_position(self.position, self.width, self.block_spec().head_dim)
        self.stack_spec()
        drops = bool(self.patch_drop or self.window)
        check_bias(self.position_bias, self._num_prefix_tokens(), drops=drops)
        check_windows(self.window, self.global_blocks, self.depth)
        if self.window and (self.scan or self._num_prefix_tokens() or self.patch_drop):
            raise UserError(
                "window needs blocks of their own and the whole grid of patches alone; write"
                " scan=False, pooling='mean', no class token, registers or patch_drop"
            )
        if self.pooling in ("token", "token_mean") and self.class_token is False:
            raise UserError(
                f"pooling={self.pooling!r} needs the class token; write pooling='mean' or 'map'"
            )
        if self.patch_drop and (self.pooling == "none" or self.block_positions):
            raise UserError("pooling='none' and block_positions keep the grid; write patch_drop=0")
        if self.depth == 0 and self.position != "none":
            raise UserError("depth=0 leaves the encoder out; write position='none' too")
        if self.fc_norm and self.pooling == "none":
            raise UserError("fc_norm norms the pooled vector; write a pooling or fc_norm=False")
        if self.position_table and not self.position.startswith("rope"):
            raise UserError("position_table is beside rotary positions; write position='learned'")
        if self.position_grid and self.position != "learned" and not self.position_table:
            raise UserError("position_grid is that of a learned table; write position='learned'")
        super().__post_init__()

    @nn.nowrap
    def block_spec(self, **fields: Any) -> BlockSpec:
        """Returns the spec of the encoder's blocks, with `fields` replaced. Raises `UserError`."""
        rope = {"rope": "fixed", "rope_dinov3": "fixed", "rope_mixed": "mixed"}
        own = {"rope": rope.get(self.position), "positions": self.block_positions}
        return super().block_spec(**own, **fields)

    @nn.nowrap
    def map_spec(self) -> BlockSpec:
        """Returns the spec of the attention pooling."""
        own = {"width": "map_dim", "num_heads": "map_heads", "mlp_dim": "map_mlp_dim"}
        sizes = {name: getattr(self, mine) or getattr(self, name) for name, mine in own.items()}
        return self.block_spec(**sizes)

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        named = named_fields(self, VisionTransformer, VIT_NAMES)
        if self.class_token and self.pooling in ("mean", "map"):
            named.add("an unread class token")
        if self.mlp == "swiglu":
            activations = VIT_NAMES["activation"]
            assert isinstance(activations, Mapping)
            named -= {*activations.values()}
        if not self.depth:
            named = named - {"no positions"} | {"no encoder"}
        if self.pooling == "map":
            shared = named & {"query-key norm", "SwiGLU"}
            named |= {f"{name} in attention pooling" for name in shared}
        grid = pair(self.position_grid) if self.position_grid else None
        place = (self.position, self.class_token_position, grid)
        return Traits("a ViT", frozenset(named), False, *place)

    @nn.compact
    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        kept: Array | tuple[Array, Array] | None = None,
        masked: tuple[Array, Array] | None = None,
    ) -> Features:
        """Encodes images, or the patches of them that are named.

        Args:
          images: float `[batch, height, width, channels]`.
          train: whether dropout, stochastic depth and patch dropout are on; they draw from the
            "dropout" key.
          kept: int32 `[batch, n]`, the patches of each image to encode, numbered row by row, in
            any order. The encoder sees no others, as masked pre-training wants it (He et al. 2022,
            MAE). None encodes all patches, or with `train` and `patch_drop` a random share. A pair
            (kept, bool `[batch, n]`) marks patches that count; no others see the rest.
          masked: (mask bool `[batch, patches]`, token `[width]`); the token stands in the place of
            the embedding of masked patches, before positions are added (Bao et al. 2022, BEiT).

        Returns:
          Features whose `tokens` are `[batch, n, width]`, in the order of `kept`, which they hold
          too; `grid` and `stages` are there only when all patches were encoded.

        Raises:
          UserError: `kept` is given to a model that needs all patches.
        """
        kept, counts = kept if isinstance(kept, tuple) else (kept, None)
        if kept is not None:
            check_kept(self.window, self.position_bias, self.block_positions)
        maps = self._stem(images)
        patches = cut_patches(maps, pair(self.patch_size))
        batch, rows, columns, _ = patches.shape
        x = self._project(patches.reshape(batch, rows * columns, -1), maps.shape[-1])
        if masked is not None:
            x = jnp.where(masked[0][:, :, None], lift(masked[1].astype(x.dtype), 3), x)
        coordinates = grid_coordinates(rows, columns)
        x, class_position = self._add_positions(x, coordinates, (rows, columns))
        if kept is None and train and self.patch_drop > 0.0:
            shape = (batch, rows * columns)
            kept = random_patches(self.make_rng("dropout"), shape, self.patch_drop)
        if kept is not None:
            x = jnp.take_along_axis(x, kept[:, :, None], axis=1)
            coordinates = coordinates[kept]
        x = self._prepend_tokens(x, class_position)
        rope = self._rope(coordinates, jnp.asarray((rows, columns), jnp.float32))
        num_prefix = self._num_prefix_tokens()
        segments = padding_segments(counts, num_prefix)
        x = self._encode(x, train, (rows, columns), rope=rope, segment_ids=segments)
        tokens = x[:, num_prefix:]
        first = num_prefix - self.num_registers
        registers = x[:, first:num_prefix] if self.num_registers else None
        pooled = self._pool(x, tokens, train)
        distill = x[:, int(self._has_class_token())] if self.distill_token else None
        found = Features(None, pooled, (), distill, registers, tokens, kept)
        if kept is not None:
            return found
        grid = tokens.reshape(batch, rows, columns, self.width)
        return found.replace(grid=grid, stages=(grid,))

    @nn.nowrap
    def _stem(self, images: Array) -> Array:
        """Maps images before they are cut into patches; hybrids have a convolutional stem."""
        return images

    @nn.nowrap
    def _has_class_token(self) -> bool:
        needed = self.pooling in ("token", "token_mean")
        return needed if self.class_token is None else self.class_token

    @nn.nowrap
    def _num_prefix_tokens(self) -> int:
        return int(self._has_class_token()) + int(self.distill_token) + self.num_registers

    @nn.nowrap
    def _project(self, patches: Array, channels: int) -> Array:
        """Embeds flattened patches `[batch, n, ph * pw * channels]` as `[batch, n, width]`."""
        spec, patch = self.block_spec(), pair(self.patch_size)
        fields = (spec.dtype, self._kept_patch(), self.initialization, self.patch_bias)
        x = PatchEmbed(patch, channels, self.width, *fields, name="patch_embed")(patches)
        if self.embed_norm:
            x = spec.make_norm("embed_norm")(x)
        return x.astype(spec.residual_dtype)

    @nn.nowrap
    def _kept_patch(self) -> tuple[int, int] | None:
        """Returns the size of patch for which the kernel is kept, if it is not `patch_size`."""
        return None

    @nn.nowrap
    def _add_positions(
        self, x: Array, coordinates: Array, grid: Sequence[int]
    ) -> tuple[Array, Array | None]:
        """Adds absolute positions to patches `[batch, n, width]`; returns the class token's too."""
        if self.position.startswith("sincos2d"):
            table = sincos_2d(coordinates, self.width, endpoint=self.position == "sincos2d")
            return x + lift(table.astype(x.dtype), x.ndim), None
        if self.position != "learned" and not self.position_table:
            return x, None
        stored = tuple(self.position_grid or grid)
        table = self._position_table(stored[0] * stored[1])
        rows = table.shape[1] - stored[0] * stored[1]
        offset, antialias = self.position_resize_offset, self.position_resize_antialias
        patches = resize_position_table(
            table[:, rows:], stored, grid, offset=offset, antialias=antialias
        )
        return x + patches.astype(x.dtype), table[:, :1] if rows else None

    @nn.nowrap
    def _position_table(self, num_patches: int) -> Array:
        """Returns the learned table, which fits the images that the model was initialized with."""
        rows = num_patches + int(self._has_class_token() and self.class_token_position)
        held = stored_shape(self, "pos_embed")
        if held is not None and held[1] != rows:
            raise UserError(
                f"the position table holds {held[1]} tokens but these images make {rows}; resize "
                "the table (vit_jax.checkpoints.load does) or feed images of the table's size"
            )
        init = SCHEMES[self.initialization].position(self.width)
        init = with_axes(init, (None, "tokens", "embed"))
        return self.param("pos_embed", init, (1, rows, self.width), jnp.float32)

    @nn.nowrap
    def _prepend_tokens(self, x: Array, class_position: Array | None) -> Array:
        """Puts class token (with its position), distillation token and registers in front."""
        parts = []
        if self._has_class_token():
            cls = self._token("cls", SCHEMES[self.initialization].class_token, 1)
            parts.append(cls if class_position is None else cls + class_position)
        init = nn.initializers.normal(stddev=0.02)
        if self.distill_token:
            parts.append(self._token("distill", init, 1))
        if self.num_registers:
            parts.append(self._token("registers", init, self.num_registers))
        parts = [jnp.broadcast_to(p.astype(x.dtype), (x.shape[0], *p.shape[1:])) for p in parts]
        return jnp.concatenate([*parts, x], axis=1)

    @nn.nowrap
    def _token(self, name: str, init: Any, count: int) -> Array:
        init = with_axes(init, (None, None, "embed"))
        return self.param(name, init, (1, count, self.width), jnp.float32)

    @nn.nowrap
    def _patch_rope(self, coordinates: Array, grid: Array) -> Array | None:
        """Returns the rotation angles of the patches, or their coordinates for rope_mixed."""
        if not self.position.startswith("rope"):
            return None
        if self.position == "rope_mixed":
            return coordinates
        kind = "dinov3" if self.position == "rope_dinov3" else "axial"
        fields: dict[str, Any] = {
            "base": self.rope_base,
            "reference": self.rope_grid,
            "offset": self.rope_offset,
            "columns_first": self.rope_columns_first,
        }
        return rotary_angles(kind, coordinates, grid, self.width // self.num_heads, **fields)

    @nn.nowrap
    def _rope(self, coordinates: Array, grid: Array) -> Array | None:
        """Returns `_patch_rope` for all tokens; those before the patches are not rotated."""
        rope = self._patch_rope(coordinates, grid)
        if rope is None:
            return None
        widths = [(0, 0)] * rope.ndim
        widths[coordinates.ndim - 2] = (self._num_prefix_tokens(), 0)
        return jnp.pad(rope, widths)

    @nn.nowrap
    def _encode(self, x: Array, train: bool, grid: tuple[int, int], **places: Any) -> Array:
        """Applies dropout, the blocks and the norms before and after them."""
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if not self.depth:
            return x
        spec = self.block_spec()
        if self.pre_norm:
            x = spec.make_norm("pre_norm")(x)
        windows = windows_of_blocks(grid, self.window, self.global_blocks, self.depth)
        places = {"windows": windows, "bias": None, **places}
        if self.position_bias != "none":
            kind = self.position_bias.removeprefix("shared_")
            prefix, hidden = self._num_prefix_tokens(), self.position_bias_dim
            bias = PositionBiasSpec(kind, grid, prefix, hidden)
            if self.position_bias == kind:
                spec = dataclasses.replace(spec, position_bias=bias)
            else:
                places["bias"] = bias.make(self.num_heads, name="position_bias")()
        x = run_blocks(x, spec, self.stack_spec(), train=train, **places)
        return spec.make_norm("norm")(x) if self.last_norm else x.astype(spec.dtype)

    @nn.nowrap
    def _pool(self, tokens: Array, patches: Array, train: bool) -> Array | None:
        """Pools all tokens, or the patches among them, into `[batch, width]`."""
        read = tokens if self.pool_prefix else patches
        if self.pooling == "none":
            return None
        if self.pooling == "token":
            pooled = tokens[:, 0]
        elif self.pooling == "map":
            pooled = MapHead(self.map_spec(), train, self.map_mlp, name="map_head")(read)[:, 0]
        else:
            pooled = jnp.mean(read, axis=1, dtype=jnp.float32)
            if self.pooling == "token_mean":
                pooled = jnp.concatenate([tokens[:, 0].astype(jnp.float32), pooled], axis=-1)
        return self.block_spec().make_norm("fc_norm")(pooled) if self.fc_norm else pooled


VARIANTS: dict[str, Variant] = {
    f"vit_{name}{patch}": Variant(VisionTransformer, {**size, "patch_size": patch})
    for name, size in SIZES.items()
    for patch in (8, 14, 16, 28, 30, 32)
} | {"vit": Variant(VisionTransformer, {}, input_size=None)}
