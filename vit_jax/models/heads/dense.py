"""Heads that answer for every place of the image: segmentation and detection.

Both sit on `Features.grid`, so that they fit every backbone, or on a pyramid made of it. Their
parameters are under `decoder` and `pyramid`: none of them is called as a classifier's, so that a
checkpoint with another head starts them anew.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.heads.pyramid import Pyramid, check_scales, merge, spread
from vit_jax.models.layers.basic import (
    ACTIVATIONS,
    Linear,
    check_choice,
    check_rate,
    cut_patches,
    lift,
    make_norm,
    token_stride,
)
from vit_jax.models.layers.initialization import with_axes
from vit_jax.models.layers.transformer import Block, BlockSpec
from vit_jax.types import Array, Features

SEGMENTATION_HEADS = ("linear", "mask", "pixels")
DETECTION_HEADS = ("per_token", "tokens")
_ACTIVATIONS = {**ACTIVATIONS, "relu": nn.relu}
"""Those of encoders, and that of the MLPs of DETR and YOLOS."""

_HEAD_DIM = 64
_EPSILON = 1e-6


def _levels_of(features: Features, scales: Sequence[float], width: int) -> list[Array]:
    """Returns the maps of a head, float32 `[batch, rows, columns, dim]`: the grid, or a `pyramid`
    of the calling module over it. Raises `UserError` if there is no grid."""
    if features.grid is None:
        raise UserError(
            "this task needs the features of every patch; write config.model.patch_drop=0"
        )
    levels = Pyramid(scales, width, name="pyramid")(features.grid) if scales else [features.grid]
    return [level.astype(jnp.float32) for level in levels]


class Segmenter(nn.Module):
    """A backbone and a head that classifies every pixel (Strudel et al. 2021, "Segmenter").

    Attributes:
      num_classes: of each pixel.
      head: "linear" classifies each token; "mask" compares tokens with learned class tokens after
        `decoder_depth` transformer blocks over both (section 3.2 of the paper). "pixels" gives an
        MLP the token and the pixels in and around its cell: thin things keep their borders, which
        strides blur.
      subcells: but with "mask", each token answers for this many by this many places inside it;
        1 is the paper's. What lies between them is interpolated bilinearly.
      decoder_width: of the mask transformer, 0 is that of what it reads; or of the hidden layer of
        "pixels", 0 is four times that.
      decoder_dropout: the rate of dropout in the blocks of the mask transformer.
      pyramid, pyramid_width: scales and width of a `Pyramid`, whose levels the head reads added up,
        a token being a place of the finest; () reads the backbone's.
    """

    backbone: nn.Module
    num_classes: int
    head: str = "linear"
    subcells: int = 1
    decoder_width: int = 0
    decoder_depth: int = 2
    decoder_dropout: float = 0.0
    pyramid: Sequence[float] = ()
    pyramid_width: int = 256

    def __post_init__(self) -> None:
        check_choice("config.task.head", self.head, SEGMENTATION_HEADS)
        check_rate("config.task.decoder_dropout", self.decoder_dropout)
        check_scales(self.pyramid)
        if self.subcells < 1 or (self.subcells > 1 and self.head == "mask"):
            raise UserError(
                f"config.task.subcells={self.subcells} is for head='linear' or 'pixels', from 1 on"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Maps images `[batch, h, w, channels]` to float32 logits `[batch, h, w, classes]`."""
        features = self.backbone(images, train=train)
        grid = merge(_levels_of(features, self.pyramid, self.pyramid_width))
        if self.head == "linear":
            logits = _LinearDecoder(self.num_classes, self.subcells, name="decoder")(grid)
        elif self.head == "pixels":
            width = self.decoder_width or 4 * grid.shape[-1]
            decoder = _PixelDecoder(self.num_classes, self.subcells, width, name="decoder")
            logits = decoder(grid, images)
        else:
            width = self.decoder_width or grid.shape[-1]
            fields = (self.num_classes, width, self.decoder_depth, train, self.decoder_dropout)
            logits = _MaskDecoder(*fields, name="decoder")(grid)
        return self._over_pixels(logits, images.shape[1:3], features.grid.shape[1:3])

    @nn.nowrap
    def _over_pixels(self, logits: Array, size: Sequence[int], grid: Sequence[int]) -> Array:
        """Logits at every pixel; those that fill no patch have their neighbours'."""
        stride = token_stride(self.backbone)
        if stride is None:
            read = list(size)
        else:
            read = [min(s * n, side) for s, n, side in zip(stride, grid, size, strict=True)]
        shape = (logits.shape[0], *read, self.num_classes)
        logits = jax.image.resize(logits, shape, "bilinear")
        rest = [(0, side - end) for side, end in zip(size, read, strict=True)]
        return jnp.pad(logits, ((0, 0), *rest, (0, 0)), mode="edge")


class _LinearDecoder(nn.Module):
    """`[b, rows, columns, dim]` to `[b, rows * subcells, columns * subcells, classes]`."""

    num_classes: int
    subcells: int

    @nn.compact
    def __call__(self, grid: Array) -> Array:
        return _subcell_scores(grid, self.num_classes, self.subcells, "embed")


class _PixelDecoder(nn.Module):
    """A `_LinearDecoder` after a hidden layer that reads tokens and pixels.

    Parameters: hidden, of `[token, pixels]`, and score.
    """

    num_classes: int
    subcells: int
    width: int

    @nn.compact
    def __call__(self, grid: Array, images: Array) -> Array:
        """Returns scores; images `[b, h, w, channels]` are those that the backbone was given."""
        pixels = _around_cells(images.astype(jnp.float32), grid.shape[1:3])
        both = jnp.concatenate([grid, pixels], axis=-1)
        hidden = nn.gelu(Linear((self.width,), (None, "mlp"), name="hidden")(both))
        return _subcell_scores(hidden, self.num_classes, self.subcells, "mlp")


def _subcell_scores(grid: Array, num_classes: int, subcells: int, axis: str) -> Array:
    """Applies a linear layer `score` of the calling module and puts the scores at their places.

    grid: `[b, rows, columns, dim]`, whose last axis has the logical name `axis`.
    """
    score = Linear(
        (subcells, subcells, num_classes),
        (axis, None, None, "classes"),
        kernel_init=nn.initializers.normal(0.02),
        name="score",
    )
    return spread(score(grid))


def _around_cells(images: Array, grid: Sequence[int]) -> Array:
    """Pixels of each cell with half a cell around it, `[b, rows, columns, 4 * cell's values]`.

    Beyond the border its pixels are repeated. Raises `UserError` where cells are not equal.
    """
    sides = images.shape[1:3]
    cell = [side // cells for side, cells in zip(sides, grid, strict=True)]
    if any(side != n * size for side, n, size in zip(sides, grid, cell, strict=True)):
        raise UserError(
            f"head='pixels' needs images that cells divide, not {list(sides)} pixels in"
            f" {list(grid)} cells; change config.data.pp's size"
        )
    margins = ((size // 2, size - size // 2) for size in cell)
    padded = jnp.pad(images, ((0, 0), *margins, (0, 0)), mode="edge")
    quarters = cut_patches(padded, (cell[0], cell[1]))
    ends = (slice(None, -1), slice(1, None))
    return jnp.concatenate([quarters[:, y, x] for y in ends for x in ends], axis=-1)


class _MaskDecoder(nn.Module):
    """The mask transformer: `[b, rows, columns, dim]` to `[b, rows, columns, classes]`.

    Parameters: embed, class_tokens `[1, classes, width]`, layer0, layer1, ..., norm, patch_proj and
    class_proj `[width, width]`, mask_norm.
    """

    num_classes: int
    width: int
    depth: int
    train: bool
    dropout: float

    @nn.compact
    def __call__(self, grid: Array) -> Array:
        batch, rows, columns, _ = grid.shape
        tokens = grid.reshape(batch, rows * columns, -1)
        tokens = Linear((self.width,), (None, "embed"), name="embed")(tokens)
        x = _with_tokens(self, "class_tokens", tokens, self.num_classes)
        x = _run_layers(x, self.depth, self.train, self.dropout)
        x = make_norm("layernorm", name="norm", dtype=jnp.float32)(x)
        patches, classes = x[:, : rows * columns], x[:, rows * columns :]
        patches = _unit(patches @ self._projection("patch_proj"))
        classes = _unit(classes @ self._projection("class_proj"))
        masks = jnp.einsum("bnd,bcd->bnc", patches, classes)
        masks = make_norm("layernorm", name="mask_norm", dtype=jnp.float32, axis="classes")(masks)
        return masks.reshape(batch, rows, columns, self.num_classes)

    @nn.nowrap
    def _projection(self, name: str) -> Array:
        init = with_axes(nn.initializers.normal(self.width**-0.5), ("embed", None))
        return self.param(name, init, (self.width, self.width), jnp.float32)


class Detector(nn.Module):
    """A backbone and a head that proposes objects: class scores and a box each.

    Attributes:
      num_classes: length of the scores, with "no object" where the loss has one.
      head: "per_token" makes one proposal of every token, its box starting at the token's place
        (OWL-ViT, Minderer et al. 2022, with a fixed list of classes); "tokens" of learned detection
        tokens: the backbone's registers where it has some (YOLOS, Fang et al. 2021), else
        `num_queries` tokens that read the grid through `decoder_depth` blocks.
      prior: probability that scores start with, through a sigmoid; 0 starts them at a bias of 0.
      pyramid, pyramid_width: scales and width of a `Pyramid`; "per_token" then makes a proposal of
        every place of every level, all by the same MLPs. () has the backbone's tokens alone.
      activation: of the MLPs, as of an encoder's, or "relu" (YOLOS).
    """

    backbone: nn.Module
    num_classes: int
    head: str = "per_token"
    num_queries: int = 100
    decoder_depth: int = 2
    prior: float = 0.01
    pyramid: Sequence[float] = ()
    pyramid_width: int = 256
    activation: str = "gelu_tanh"

    def __post_init__(self) -> None:
        check_choice("config.task.head", self.head, DETECTION_HEADS)
        check_choice("activation", self.activation, _ACTIVATIONS)
        check_scales(self.pyramid)
        if self.pyramid and self.head == "tokens":
            raise UserError(
                "config.task.pyramid: detection tokens read one map; write head='per_token'"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> tuple[Array, Array]:
        """Maps images `[batch, h, w, channels]` to float32 scores and boxes of N proposals.

        Returns scores `[batch, N, num_classes]` (logits) and boxes `[batch, N, 4]` as
        (y0, x0, y1, x1), whose centres are within 0..1 of the image.
        """
        features: Features = self.backbone(images, train=train)
        decoder = _DetectionDecoder(
            self.num_classes,
            self.head,
            self.num_queries,
            self.decoder_depth,
            self.prior,
            train,
            self.activation,
            name="decoder",
        )
        levels = _levels_of(features, self.pyramid, self.pyramid_width)
        return decoder(levels, features.registers)


class _DetectionDecoder(nn.Module):
    """Scores and boxes from all places of all levels, or from detection tokens that read them."""

    num_classes: int
    head: str
    num_queries: int
    depth: int
    prior: float
    train: bool
    activation: str

    @nn.compact
    def __call__(self, levels: Sequence[Array], registers: Array | None) -> tuple[Array, Array]:
        batch, *_, dim = levels[0].shape
        x = jnp.concatenate([level.reshape(batch, -1, dim) for level in levels], axis=1)
        start = lift(jnp.concatenate([_place_logits(*level.shape[1:3]) for level in levels]), 3)
        if self.head == "tokens":
            start = jnp.zeros((1, 1, 4))
            x = self._read_grid(x) if registers is None else registers.astype(jnp.float32)
        bias: Array | float = -jnp.log(1 / self.prior - 1) if self.prior else 0.0
        act = self.activation
        sizes = (dim, dim, self.num_classes)
        scores = BoxMlp(sizes, last_bias=bias, activation=act, name="score")(x)
        offsets = BoxMlp((dim, dim, 4), zero=True, activation=act, name="box")(x)
        return scores, corners(jax.nn.sigmoid(offsets + start))

    @nn.nowrap
    def _read_grid(self, tokens: Array) -> Array:
        """Returns detection tokens `[b, num_queries, dim]` after blocks over them and the grid."""
        x = _with_tokens(self, "detection_tokens", tokens, self.num_queries)
        x = _run_layers(x, self.depth, self.train)
        x = make_norm("layernorm", name="norm", dtype=jnp.float32)(x)
        return x[:, tokens.shape[1] :]


class BoxMlp(nn.Module):
    """Dense layers with an activation between them.

    zero: start the last layer at zero, so that every proposal starts where it is placed.
    """

    sizes: Sequence[int]
    last_bias: Array | float = 0.0
    zero: bool = False
    activation: str = "gelu_tanh"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, size in enumerate(self.sizes[:-1]):
            x = Linear((size,), ("embed", "mlp"), name=f"dense{i + 1}")(x)
            x = _ACTIVATIONS[self.activation](x)
        init = nn.initializers.zeros if self.zero else nn.initializers.xavier_uniform()
        last = Linear(
            (self.sizes[-1],),
            ("mlp", None),
            kernel_init=init,
            bias_init=nn.initializers.constant(self.last_bias),
            name=f"dense{len(self.sizes)}",
        )
        return last(x)


def _with_tokens(module: nn.Module, name: str, tokens: Array, count: int) -> Array:
    """Appends `count` learned tokens, a parameter of `module`, to `tokens` `[b, n, width]`."""
    init = with_axes(nn.initializers.normal(0.02), (None, None, "embed"))
    learned = module.param(name, init, (1, count, tokens.shape[-1]), jnp.float32)
    learned = jnp.broadcast_to(learned, (tokens.shape[0], count, tokens.shape[-1]))
    return jnp.concatenate([tokens, learned], axis=1)


def _run_layers(x: Array, depth: int, train: bool, dropout: float = 0.0) -> Array:
    """Runs transformer blocks named layer0, layer1, ..., not the `blocks` that optimizers group."""
    width = x.shape[-1]
    num_heads = width // _HEAD_DIM if width % _HEAD_DIM == 0 else 1
    spec = BlockSpec.create(
        width=width,
        num_heads=num_heads,
        mlp_dim=None,
        dropout=dropout,
        attention_dropout=dropout,
    )
    for i in range(depth):
        x, _ = Block(spec, train, name=f"layer{i}")(x, None, None, None)
    return x


def _unit(x: Array) -> Array:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + _EPSILON)


def _place_logits(rows: int, columns: int) -> Array:
    """Returns each token's cell `[rows * columns, 4]` as logits of (center y, x, height, width)."""
    y = (jnp.arange(rows) + 0.5) / rows
    x = (jnp.arange(columns) + 0.5) / columns
    centres = jnp.stack(jnp.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)
    sizes = jnp.clip(jnp.array([1 / rows, 1 / columns]), 0.0, 0.5)
    cells = jnp.concatenate([centres, jnp.broadcast_to(sizes, centres.shape)], -1)
    return jnp.log(cells) - jnp.log1p(-cells)


def corners(boxes: Array) -> Array:
    """Maps (center y, center x, height, width) to (y0, x0, y1, x1)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], -1)
