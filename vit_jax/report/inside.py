"""Figures of the inside of a model: patches, attention and the filters of the first layer.

The module `figures` describes how figures are made, and saves them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage

from vit_jax.report.figures import (
    GRID,
    INK,
    LETTER_WIDTH,
    MUTED,
    PAGE_WIDTH,
    PAPER,
    SERIES,
    Image,
    displayable,
    draw_image,
    image_grid,
    new_figure,
    quiet_axes,
    words,
)
from vit_jax.types import Images

MAX_COLUMNS = 8

HEAT = "inferno"
MOST_TIMES = 16
"""The scale of attention that is drawn over pictures: from the mean to so many times the mean."""

_MOSAIC_SIDE = 40  # pixels; smaller maps are enlarged to this size


def attention_panel(
    images: Images,
    overlays: Mapping[str, Sequence[Image]],
    titles: Sequence[str] | None = None,
) -> Figure:
    """Returns a column for each image: the image, and below it a labeled row for each overlay.

    Args:
      images: those after the first `MAX_COLUMNS` follow in rows below.
      overlays: from a kind, such as "rollout", to one picture for each image.
      titles: a line above each image.
    """
    kinds = {"image": images, **overlays}
    columns = min(len(images), MAX_COLUMNS)
    lines = math.ceil(len(images) / columns)
    aspect = images[0].shape[0] / images[0].shape[1]
    width = (PAGE_WIDTH - 1.0) / max(columns, 5)
    height = lines * (len(kinds) * width * aspect + 0.35)
    figure = new_figure(columns * width + 1.0, height)
    letters = int(width / LETTER_WIDTH)
    for row, (kind, pictures) in enumerate(kinds.items()):
        for index, picture in enumerate(pictures):
            line, column = divmod(index, columns)
            place = (line * len(kinds) + row) * columns + column + 1
            axes = figure.add_subplot(lines * len(kinds), columns, place)
            draw_image(axes, np.asarray(picture))
            if column == 0:
                axes.set_ylabel(words(kind), color=MUTED, fontsize=9)
            if row == 0 and titles:
                # An empty line keeps a title apart from the pictures of the images above it.
                title = "\n" * (line > 0) + words(titles[index], letters)
                axes.set_title(title, color=INK, fontsize=8.5, fontweight="bold")
    _times_bar(figure, figure.axes)
    return figure


def attention_heads(
    image: Image,
    heads: np.ndarray,
    summaries: Mapping[str, Image],
    title: str = "attention of each head",
) -> Figure:
    """Returns the attention maps of every head of every layer of a model for one image.

    Args:
      image: the input.
      heads: `[layers, heads, h, w]`, each map on its own scale.
      summaries: pictures shown beside the image, such as {"rollout": overlay}.
      title: above the maps.
    """
    layers, count, height, width = heads.shape
    aspect = height / width
    cell = float(np.clip(7.0 / count, 0.3, 1.4))
    mosaic_width, mosaic_height = count * cell, layers * cell * aspect
    side = 1.9
    figure = new_figure(
        mosaic_width + side + 1.9,
        max(mosaic_height + 0.5, (1 + len(summaries)) * (side * aspect + 0.25)),
    )
    ratios = [side + 0.6, mosaic_width + 1.3]
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=ratios).flat
    for part in (left, right):
        part.set_facecolor(PAPER)
    pictures = {"image": image, **summaries}
    for index, (name, picture) in enumerate(pictures.items()):
        axes = left.add_subplot(len(pictures), 1, index + 1)
        draw_image(axes, np.asarray(picture))
        axes.set_title(words(name), color=INK, fontsize=9, fontweight="bold")
    if summaries:
        _times_bar(left, left.axes[1:])
    axes = right.add_subplot()
    own_scale = heads / np.maximum(heads.max(axis=(2, 3), keepdims=True), 1e-12)
    drawn = _mosaic(axes, own_scale, cmap="magma", vmin=0, vmax=1)
    _color_bar(right, drawn, axes, "share of the head's largest")
    axes.set_yticklabels(range(1, layers + 1))
    axes.set_xticklabels(range(1, count + 1))
    axes.set_ylabel("layer", color=MUTED, fontsize=9)
    axes.set_title(words(title), color=INK, fontsize=9, fontweight="bold")
    axes.set_xlabel("head", color=MUTED, fontsize=9)
    quiet_axes(axes)
    return figure


def _times_bar(figure: FigureBase, axes: Any) -> None:
    """Draws the scale of the overlays beside axes."""
    scale = ScalarMappable(LogNorm(1, MOST_TIMES), HEAT)
    bar = _color_bar(figure, scale, axes, "times uniform attention")
    ticks = [2**power for power in range(int(math.log2(MOST_TIMES)) + 1)]
    bar.set_ticks(ticks, labels=[f"{tick}×" for tick in ticks])
    bar.minorticks_off()


def _color_bar(figure: FigureBase, scale: ScalarMappable, axes: Any, label: str) -> Colorbar:
    """Returns a quiet bar of the colors of `scale`, which takes its place from `axes`."""
    bar = figure.colorbar(scale, ax=axes, shrink=0.6, pad=0.02, aspect=30)
    bar.set_label(label, color=MUTED, fontsize=8.5)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    return bar


def attention_distances(distances: np.ndarray, grid: tuple[int, int]) -> Figure:
    """Returns the attention distance of each head, layer by layer (ViT paper, Fig. 7 right).

    Args:
      distances: `[layers, heads]`, in patches.
      grid: rows and columns of patches.
    """
    layers = np.arange(1, len(distances) + 1)
    rows, columns = np.indices(grid).reshape(2, -1)
    apart = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    figure = new_figure(5.6, 3.1)
    axes = figure.add_subplot()
    for head in distances.T:
        axes.plot(layers, head, "o", color=SERIES[0], ms=6, alpha=0.75, mec=PAPER, mew=0.6)
    axes.axhline(apart.mean(), color=MUTED, ls=":", lw=1.2)
    # A convolution reaches one patch further with each layer, farthest along the diagonal.
    reach = np.minimum(np.sqrt(2) * layers, apart.max())
    axes.plot(layers, reach, color=SERIES[1], ls="--", lw=1.2)
    names = ("a head, mean", "attention to all patches alike, mean", "3×3 convolutions, farthest")
    handles = [axes.lines[0], axes.lines[-2], axes.lines[-1]]
    axes.legend(handles, names, frameon=False, fontsize=8, labelcolor=MUTED, loc="lower right")
    axes.grid(color=GRID, lw=0.8)
    axes.set_xticks(layers[:: max(1, len(layers) // 12)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer", color=MUTED, fontsize=9)
    axes.set_ylabel("distance (patches)", color=MUTED, fontsize=9)
    quiet_axes(axes)
    return figure


def image_in_patches(image: Image, patch: tuple[int, int], limit: int = 48) -> Figure:
    """Returns an image, its patches, and the sequence that they become.

    Args:
      image: pixels beyond the last whole patch are left out of the patches.
      patch: height and width of a patch, in pixels.
      limit: the number of patches of the sequence that are drawn.
    """
    pixels = displayable(image)
    (high, wide), (rows, columns) = (
        patch,
        (pixels.shape[0] // patch[0], pixels.shape[1] // patch[1]),
    )
    cut = pixels[: rows * high, : columns * wide]
    cut = cut.reshape(rows, high, columns, wide, 3).transpose(0, 2, 1, 3, 4)
    few = rows * columns <= limit
    aspect = pixels.shape[0] / pixels.shape[1]
    per_line = min(rows * columns, limit, 16)
    shown = min(rows * columns, limit)
    lines = math.ceil(shown / per_line)
    line = 7.6 / per_line * high / wide + 0.2
    figure = new_figure(8.0, 3.6 * aspect + 0.3 + lines * line + 0.3)
    ratios = [3.6 * aspect + 0.3, lines * line + 0.3]
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios).flat
    whole, apart = top.subfigures(1, 2)
    for part in (top, bottom, whole, apart):
        part.set_facecolor(PAPER)
    axes = whole.add_subplot()
    draw_image(axes, pixels)
    axes.set_title(f"image, {pixels.shape[0]}×{pixels.shape[1]} pixels", color=INK, fontsize=9)
    _tiles(apart, cut.reshape(-1, high, wide, 3), (rows, columns), numbered=few)
    apart.suptitle(f"{rows}×{columns} patches of {high}×{wide}", color=INK, fontsize=9)
    _tiles(bottom, cut.reshape(-1, high, wide, 3)[:shown], (lines, per_line), numbered=True)
    title = "the sequence" if few else f"the first {shown} of a sequence of {rows * columns}"
    bottom.suptitle(title, color=INK, fontsize=9)
    return figure


def position_similarity(pos_embed: np.ndarray, max_side: int = 8) -> Figure:
    """Returns the cosine similarity of each position's embedding with all others.

    See the ViT paper, Fig. 7 center.

    Args:
      pos_embed: `[h, w, dim]` without prefix tokens.
      max_side: the largest number of rows and columns drawn; larger grids are thinned evenly.
    """
    pos_embed = np.asarray(pos_embed, np.float32)
    height, width, _ = pos_embed.shape
    unit = pos_embed / np.maximum(np.linalg.norm(pos_embed, axis=-1, keepdims=True), 1e-12)
    rows = np.unique(np.linspace(0, height - 1, min(height, max_side)).round().astype(int))
    columns = np.unique(np.linspace(0, width - 1, min(width, max_side)).round().astype(int))
    maps = np.einsum("rcd,hwd->rchw", unit[np.ix_(rows, columns)], unit)
    side = 5.2
    figure = new_figure(side + 0.9, side * len(rows) * height / (len(columns) * width) + 0.3)
    axes = figure.add_subplot()
    drawn = _mosaic(axes, maps, cmap="viridis", vmin=-1, vmax=1)
    axes.set_yticklabels(rows + 1)
    axes.set_xticklabels(columns + 1)
    axes.set_xlabel("patch column", color=MUTED, fontsize=9)
    axes.set_ylabel("patch row", color=MUTED, fontsize=9)
    quiet_axes(axes)
    _color_bar(figure, drawn, axes, "cosine similarity")
    return figure


def patch_filters(kernel: np.ndarray, count: int = 28) -> Figure:
    """Returns principal components of the patch embedding's filters (ViT paper, Fig. 7 left).

    Args:
      kernel: `[patch_h, patch_w, channels, width]`.
      count: the number of components drawn, in descending order of explained variance.
    """
    kernel = np.asarray(kernel, np.float32)
    *patch, width = kernel.shape
    filters = kernel.reshape(-1, width)
    components, _, _ = np.linalg.svd(
        filters - filters.mean(axis=1, keepdims=True), full_matrices=False
    )
    components = components[:, : min(count, components.shape[1])]
    # The sign of a component is arbitrary, so the sign that makes its largest entry bright is used.
    largest = np.abs(components).argmax(axis=0)
    components = components * np.sign(components[largest, np.arange(components.shape[1])])
    pictures = [
        (0.5 + 0.5 * component / max(np.abs(component).max(), 1e-12)).reshape(patch)
        for component in components.T
    ]
    if patch[2] not in (1, 3):
        pictures = [picture.mean(axis=-1) for picture in pictures]
    return image_grid(pictures, columns=7)


def _mosaic(axes: Axes, maps: np.ndarray, **style: Any) -> AxesImage:
    """Draws `[rows, columns, h, w]` maps in a grid, with transparent gaps.

    Ticks mark the middle of each row and column. style: arguments of `imshow`.
    """
    # Cells are repeated, so that the gap between small maps is narrower than a cell.
    repeats = math.ceil(_MOSAIC_SIDE / max(maps.shape[2:]))
    maps = maps.repeat(repeats, axis=2).repeat(repeats, axis=3)
    rows, columns, height, width = maps.shape
    gap = max(2, max(height, width) // 10)
    padding = ((0, 0), (0, 0), (0, gap), (0, gap))
    padded = np.pad(maps.astype(np.float32), padding, constant_values=np.nan)
    joined = padded.transpose(0, 2, 1, 3).reshape(rows * (height + gap), -1)
    axes.set_yticks(np.arange(rows) * (height + gap) + (height - 1) / 2)
    axes.set_xticks(np.arange(columns) * (width + gap) + (width - 1) / 2)
    return axes.imshow(joined[:-gap, :-gap], interpolation="nearest", **style)


def _tiles(
    part: FigureBase, patches: np.ndarray, shape: tuple[int, int], *, numbered: bool
) -> None:
    """Draws patches `[n, h, w, 3]` in rows and columns, with gaps and, if `numbered`, numbers."""
    for index, patch in enumerate(patches):
        axes = part.add_subplot(*shape, index + 1)
        draw_image(axes, patch)
        if numbered:
            axes.set_title(str(index + 1), color=MUTED, fontsize=7, pad=2)
