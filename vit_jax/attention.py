"""Attention maps: the attention weights of every layer and head, and their summaries.

    maps = attention_maps(model, params, images)
    overlay(picture, rollout(maps)[0]).save("rollout.png")

All kinds of pooling are supported. With a class token, the maps show the attention of that token.
With attention pooling, the output's map shows the attention of the probe. Otherwise the maps show
the mean over all patches. Images need not be square.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vit_jax import models
from vit_jax.errors import UserError, first_line, quoted
from vit_jax.report import Section, figures, inside
from vit_jax.types import Array, Images, Params

_OVERLAY_SIDE = 224  # pixels; smaller pictures are enlarged to about this
MOST_TIMES = inside.MOST_TIMES

PANEL_IN_WORDS = "Images, with their attention and their rollout drawn over them below."
"""What `panel` shows, for those who cannot see it."""


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Attention weights of a batch of images; each row over keys sums to one.

    Attributes:
      layers: float32 `[layers, batch, heads, queries, keys]`. Queries and keys are the tokens:
        first the `num_prefix` tokens that represent no patch (the class token, then the registers),
        then the patches row by row.
      pooled: `[batch, heads, patches]`, the probe's weights under attention pooling, else None.
      grid: (rows, columns) of patches.
      num_prefix: the number of tokens before the patches.
      reads_class_token: whether the model computes its output from the class token.
    """

    layers: np.ndarray
    pooled: np.ndarray | None
    grid: tuple[int, int]
    num_prefix: int
    reads_class_token: bool


def attention_maps(model: nn.Module, params: Params, images: Array | np.ndarray) -> AttentionMaps:
    """Runs `images` through `model` and returns the attention weights.

    The weights are large (layers · heads · tokens² numbers for each image), so pass only a few
    images at a time.

    Args:
      model: a model that `vit_jax.models.build` returned, with or without a head.
      params: the parameters of the model.
      images: normalized floats `[batch, height, width, channels]`, as the model takes them.

    Raises:
      UserError: the model has no self-attention, or the images or parameters do not fit it.
    """
    _check_images(images)
    backbone, params = _backbone(model, params)

    @jax.jit
    def apply(params: Params, images: Array) -> tuple[Any, Mapping[str, Any]]:
        return backbone.apply({"params": params}, images, mutable=["intermediates"])

    try:
        features, state = apply(params, images)
    except flax.errors.FlaxError as error:  # A parameter is missing, or has another shape.
        raise UserError(f"model, parameters and images do not fit: {first_line(error)}") from error
    layers, pooled = _sown(jax.device_get(state.get("intermediates", {})))
    if layers is None or features.grid is None:
        raise UserError(
            f"{type(backbone).__name__} has no self-attention over a grid of patches to show; "
            "attention maps need a Vision Transformer"
        )
    rows, columns = features.grid.shape[1:3]
    return AttentionMaps(
        layers=layers,
        pooled=pooled,
        grid=(rows, columns),
        num_prefix=layers.shape[-1] - rows * columns,
        reads_class_token="class token" in models.traits_of(backbone).named,
    )


def _check_images(images: Any) -> None:
    """Raises a `UserError` unless images have the form that models take."""
    shape, dtype = getattr(images, "shape", ()), getattr(images, "dtype", np.dtype(object))
    if len(shape) != 4 or 0 in shape or not jax.numpy.issubdtype(dtype, np.floating):
        found = f"{dtype} {list(shape)}" if shape else quoted(images)
        raise UserError(
            f"images are {found}: give normalized floats [batch, height, width, channels], as the"
            " model takes them"
        )


def head_maps(maps: AttentionMaps) -> np.ndarray:
    """Returns the attention of every head to the patches, `[layers, batch, heads, rows, columns]`.

    The maps hold the weights of the class token, or the mean over all patches if the model reads no
    class token. They leave out the weights on class and register tokens, so each map sums to at
    most one.
    """
    to_patches = maps.layers[..., maps.num_prefix :]
    if maps.reads_class_token:
        weights = to_patches[..., 0, :]
    else:
        weights = to_patches[..., maps.num_prefix :, :].mean(axis=-2)
    return weights.reshape(*weights.shape[:-1], *maps.grid)


def last_layer_map(maps: AttentionMaps) -> np.ndarray:
    """Returns the attention that yields the output, averaged over heads: `[batch, rows, columns]`.

    This is the attention of the pooling probe if the model has one, and otherwise that of the last
    layer. Each map sums to one.
    """
    if maps.pooled is not None:
        weights = maps.pooled.mean(axis=1).reshape(-1, *maps.grid)
    else:
        weights = head_maps(maps)[-1].mean(axis=1)
    return _normalised(weights)


def rollout(maps: AttentionMaps) -> np.ndarray:
    """Returns the attention rollout through all layers: `[batch, rows, columns]`.

    The method is that of Abnar and Zuidema (2020), "Quantifying attention flow in transformers",
    section 3. Each layer contributes one half of its attention, averaged over heads, and one half
    of the identity, which represents the residual connection. Each map sums to one.
    """
    batch, tokens = maps.layers.shape[1], maps.layers.shape[-1]
    # The product is computed from the output backward, so each image needs only one row.
    row = np.zeros((batch, tokens), np.float32)
    if maps.pooled is not None:
        row[:, maps.num_prefix :] = maps.pooled.mean(axis=1)
    elif maps.reads_class_token:
        row[:, 0] = 1.0
    else:
        row[:, maps.num_prefix :] = 1.0 / (tokens - maps.num_prefix)
    for weights in maps.layers[::-1]:
        row = 0.5 * row + 0.5 * np.einsum("bq,bqk->bk", row, weights.mean(axis=1))
    return _normalised(row[:, maps.num_prefix :].reshape(batch, *maps.grid))


def distances(maps: AttentionMaps) -> np.ndarray:
    """Returns the mean attention distance of each head, `[layers, heads]`, in patches.

    The distance from a patch to the others is weighted by its attention to them, and averaged over
    all patches and over the batch (Dosovitskiy et al. 2021, figure 7 right). Attention to class and
    register tokens is left out.
    """
    rows, columns = np.indices(maps.grid).reshape(2, -1)
    apart = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    weights = maps.layers[..., maps.num_prefix :, maps.num_prefix :]
    far = (weights * apart).sum(axis=-1) / np.maximum(weights.sum(axis=-1), 1e-12)
    return far.mean(axis=(1, 3))


def overlay(picture: np.ndarray | Image.Image, heat: np.ndarray) -> Image.Image:
    """Returns `picture` with `heat` drawn over it where it is above the mean, smoothly resized.

    The color tells how many times the mean the heat is, on one scale for all pictures: 1 leaves the
    picture as it is, and `MOST_TIMES` is the brightest. So a model that looks everywhere alike
    leaves the picture bare.

    Args:
      picture: `[h, w, 3 or 1]`, uint8 or floats, or a PIL image. Small pictures are enlarged.
      heat: `[rows, columns]`, not negative, on any scale.
    """
    image = Image.fromarray(figures.displayable(np.asarray(picture)))
    scale = max(1, round(_OVERLAY_SIDE / max(image.size)))
    size = (image.width * scale, image.height * scale)
    pixels = np.asarray(image.resize(size, Image.Resampling.NEAREST), np.float32) / 255
    heat = np.asarray(heat, np.float32)
    times = heat / max(float(heat.mean()), 1e-12)
    smooth = np.asarray(Image.fromarray(times).resize(size, Image.Resampling.BILINEAR))
    strength = np.log(smooth.clip(1, MOST_TIMES)) / np.log(MOST_TIMES)
    color = matplotlib.colormaps[inside.HEAT](strength)[..., :3]
    weight = np.minimum(0.85, 2 * strength)[..., None]
    mixed = (1 - weight) * pixels + weight * color
    return Image.fromarray(np.round(255 * mixed).astype(np.uint8))


def figure(picture: np.ndarray | Image.Image, maps: AttentionMaps, index: int = 0) -> Figure:
    """Returns a figure of one image: all heads of all layers, the output's map and the rollout.

    Args:
      picture: the image before it is normalized.
      maps: the attention weights of a batch that contains the image.
      index: the position of the image in that batch.
    """
    summaries = {
        _output_name(maps): np.asarray(overlay(picture, last_layer_map(maps)[index])),
        "rollout": np.asarray(overlay(picture, rollout(maps)[index])),
    }
    title = "attention of each head"
    title += "" if maps.reads_class_token else ", mean of patches"
    picture = np.asarray(picture)
    return inside.attention_heads(picture, head_maps(maps)[:, index], summaries, title)


def panel(pictures: Images, maps: AttentionMaps, titles: Sequence[str] | None = None) -> Figure:
    """Returns a figure with a column for each image: image, output's map and rollout."""
    kinds = {_output_name(maps): last_layer_map(maps), "rollout": rollout(maps)}
    overlays = {
        kind: [np.asarray(overlay(*pair)) for pair in zip(pictures, heats, strict=True)]
        for kind, heats in kinds.items()
    }
    return inside.attention_panel(pictures, overlays, titles)


def sections(
    model: nn.Module,
    params: Params,
    images: Array | np.ndarray,
    pictures: Images,
    titles: Sequence[str] | None = None,
) -> list[Section]:
    """Returns the sections of the report about attention, patch filters and positions.

    Sections that do not apply to the model are left out.

    Args:
      model, params: as for `attention_maps`.
      images: up to eight images, as the model takes them.
      pictures: the same images before they are normalized.
      titles: a title for each image.
    """
    try:
        maps = attention_maps(model, params, images)
    except UserError:
        maps = None
    found = [] if maps is None else _maps_sections(maps, pictures, titles)
    _, tree = _backbone(model, params)
    tree = nn.meta.unbox(tree)
    kernel = _pixel_kernel(tree)
    if kernel is not None:
        what = "of the first convolution" if "stem" in tree else "that turn a patch into a token"
        text = f"Principal components of the filters {what}, the one that explains most first."
        title = "What the first filters see" if "stem" in tree else "What a patch is made of"
        filters = inside.patch_filters(jax.device_get(kernel))
        found.append(Section(title, text, filters, alt="A grid of filters, drawn as pictures."))
    if "pos_embed" in tree and maps is not None:
        text = (
            "Cosine similarity of the learned position of each patch with those of all others."
            " With enough training neighbours become alike, and so do rows and columns."
        )
        (rows, columns), table = maps.grid, jax.device_get(tree["pos_embed"])[0]
        kept = models.traits_of(model).table_grid
        if kept:
            table = models.resize_grid(table.reshape(*kept, -1), (rows, columns))
        else:
            table = table[-rows * columns :].reshape(rows, columns, -1)
        alike = inside.position_similarity(np.asarray(table))
        alt = f"For each of {rows} by {columns} patches, a map of its similarity to all patches."
        found.append(Section("What positions are like", text, alike, alt=alt))
    return found


def _maps_sections(
    maps: AttentionMaps, pictures: Images, titles: Sequence[str] | None
) -> list[Section]:
    """Returns the sections about attention on `pictures`; see `sections`."""
    found = []
    text = (
        "Above, the images; below, the attention that the output is made from, and attention"
        " followed through all layers (rollout, Abnar and Zuidema 2020), colored where it is"
        " above the mean."
    )
    image = panel(pictures, maps, titles)
    found.append(Section("Where the model looks", text, image, alt=PANEL_IN_WORDS))
    text = "The first of these images, and what each head of each layer attends to in it."
    layers, heads = len(maps.layers), maps.layers.shape[2]
    alt = f"One image and its attention in {layers} layers of {heads} heads each."
    found.append(Section("Attention of every head", text, figure(pictures[0], maps), alt=alt))
    text = (
        "Mean distance, in patches, from a patch to those that a head attends to. A convolution"
        " of 3×3 patches reaches one patch further a layer; a head may look anywhere at once."
    )
    reached = distances(maps)
    far = inside.attention_distances(reached, maps.grid)
    alt = (
        f"The mean distance of the heads is {reached[0].mean():.1f} patches in the first layer"
        f" and {reached[-1].mean():.1f} in the last."
    )
    found.append(Section("How far every head looks", text, far, alt=alt))
    return found


def _pixel_kernel(tree: Params) -> Array | None:
    """Returns the kernel that reads pixels, `[h, w, channels, filters]`, of a backbone with one."""
    first = tree.get("patch_embed", {})
    if "stem" in tree:  # Then the patches are cells of a feature map.
        first = tree["stem"].get("conv0") or tree["stem"].get("root", {}).get("conv", {})
    return first.get("kernel")


def _backbone(model: nn.Module, params: Params) -> tuple[nn.Module, Params]:
    """Returns the part of `model` that returns `Features`, and its parameters."""
    return (model.backbone, params["backbone"]) if models.has_head(model) else (model, params)


def _sown(intermediates: Mapping[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns (weights of all layers, weights of the pooling probe) from the sown intermediates."""
    pooled = None
    if "map_head" in intermediates:
        pooled = intermediates["map_head"]["attn"]["attention"][0][:, :, 0]
    if "blocks" in intermediates:  # Scanned layers are already stacked.
        return intermediates["blocks"]["attn"]["attention"][0], pooled
    names = [name for name in intermediates if name.startswith("blocks_")]
    names.sort(key=lambda name: int(name.removeprefix("blocks_")))
    weights = [intermediates[name]["attn"]["attention"][0] for name in names]
    return (np.stack(weights) if weights else None), pooled


def _normalised(weights: np.ndarray) -> np.ndarray:
    """Returns `[batch, rows, columns]`, scaled so that each map sums to one."""
    return weights / np.maximum(weights.sum(axis=(1, 2), keepdims=True), 1e-12)


def _output_name(maps: AttentionMaps) -> str:
    return "last layer" if maps.pooled is None else "pooling"
