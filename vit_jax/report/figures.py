"""Figures of results: learning curves, confusion matrix, image grids.

The module `inside` has the figures of models. Every function returns a `matplotlib.figure.Figure`
made without pyplot, so that no global state changes and no display is needed. Text and lines use
only the colors named here, which `svg` replaces on a dark page. Texts of users (names of classes,
captions) pass through `words`, so that matplotlib never interprets them as formulas.
"""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.text
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from vit_jax.report import curves
from vit_jax.report.drawing import legible_ink
from vit_jax.tracking import Metric
from vit_jax.tracking.plain_text import one_line
from vit_jax.types import Images

INK, MUTED, GRID, PAPER = "#1b1f24", "#68727e", "#e3e7ec", "#ffffff"
SERIES = ("#2463eb", "#e8700a", "#0d9488", "#9333ea", "#db2777", "#64748b")
_DARK_SERIES = ("#6d9bff", "#ff9d4d", "#2dd4bf", "#c084fc", "#f472b6", "#94a3b8")
DARK = {
    INK: "#e9ecf1",
    MUTED: "#98a3b0",
    GRID: "#2b323c",
    PAPER: "#14181e",
    **dict(zip(SERIES, _DARK_SERIES, strict=True)),
}
"""The color on a dark page of each color that figures are drawn with."""

DPI = 160
PAGE_WIDTH = 10.4  # inches; the width of the report
_LONGEST_TEXT = 40  # characters; longer texts are cut
_LONGEST_CLASS = 24
LETTER_WIDTH = 0.08  # inches, of titles and notes below images
_RIGHT_CELLS = LinearSegmentedColormap.from_list("right", ["#dbe7fe", "#2463eb"])
_WRONG_CELLS = LinearSegmentedColormap.from_list("wrong", ["#fde6cf", "#d9480f"])
_MAX_NAMED_CLASSES = 60
_MAX_NUMBERED_CLASSES = 25
_NOISY_FROM = 60  # points; longer lines of the training loss are also shown smoothed
_LOG_SCALE_FROM = 50  # largest over smallest value

Image = np.ndarray
"""`[height, width, 3 or 1]` or `[height, width]`; uint8, or floats (0..1, else stretched to it)."""


def words(text: object, limit: int = _LONGEST_TEXT) -> str:
    """Returns a user's text escaped for matplotlib, on one line, shortened if it is long.

    Without this, matplotlib would interpret text between two dollar signs as a formula.
    """
    return one_line(str(text), limit).replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """Returns `figure` as a PNG file, in the colors of a light page."""
    return _saved(figure, "png", facecolor=PAPER)


def svg(figure: Figure) -> bytes:
    """Returns `figure` as an SVG file without a background, for light and dark pages.

    The file holds the colors for both kinds of pages. Its texts are not converted to paths, because
    a browser has fonts for characters that matplotlib's fonts lack.
    """
    drawing = _saved(figure, "svg", transparent=True).decode()
    names = {color: f"c{number}" for number, color in enumerate(DARK)}
    for color, name in names.items():
        drawing = re.sub(rf"(?<=: ){color}(?=[;\"])", f"var(--{name})", drawing)
    light, dark = (
        ";".join(f"--{names[color]}:{DARK[color] if is_dark else color}" for color in DARK)
        for is_dark in (False, True)
    )
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    start = drawing.index(">", drawing.index("<svg")) + 1
    return (drawing[:start] + style + drawing[start:]).encode()


def _saved(figure: Figure, file_format: str, **style: Any) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if file_format == "svg" else None
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vit_jax"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format=file_format, dpi=DPI, metadata=metadata, **style)
    return buffer.getvalue()


def learning_curves(
    rows: Sequence[Mapping[str, float]], metric_info: Mapping[str, Metric]
) -> Figure | None:
    """Returns the main charts of the metrics log, two in a row; None if nothing was logged."""
    charts = [chart for chart in curves.charts(rows, metric_info) if chart.is_main]
    if not charts:
        return None
    columns = min(2, len(charts))
    lines = math.ceil(len(charts) / columns)
    figure = new_figure(5.2 * columns, 3.1 * lines)
    for index, chart in enumerate(charts):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw_chart(axes, chart)
        axes.set_title(words(chart.title), color=INK, fontsize=11, loc="left", fontweight="bold")
        axes.set_xlabel("step", color=MUTED, fontsize=8.5)
        if chart.needs_legend and len(chart.series) <= len(SERIES):
            axes.legend(frameon=False, fontsize=8, labelcolor=MUTED)
    return figure


def learning_curve(chart: curves.Chart, colors: Sequence[int] = ()) -> Figure:
    """Returns one chart without title and legend, which the page provides.

    colors: a number of `SERIES` for each line; in their order by default.
    """
    figure = new_figure(4.0, 2.4)
    axes = figure.add_subplot()
    _draw_chart(axes, chart, colors)
    axes.set_xlabel("step", color=MUTED, fontsize=8.5)
    return figure


def _draw_chart(axes: Axes, chart: curves.Chart, colors: Sequence[int] = ()) -> None:
    numbers = colors or range(len(chart.series))
    for number, series in zip(numbers, chart.series, strict=True):
        color = SERIES[number % len(SERIES)]
        steps, values = map(np.asarray, zip(*series.points, strict=True))
        if series.label == "train loss" and len(steps) > _NOISY_FROM:
            axes.plot(steps, values, color=color, lw=0.8, alpha=0.3)
            values = _smoothed(values)
        marker = "o" if len(steps) == 1 else None
        label = words(series.label)
        axes.plot(steps, values, color=color, lw=1.5, label=label, marker=marker, ms=4)
    heights = [value for series in chart.series for _, value in series.points]
    if chart.scale == "auto" and min(heights) > 0 and max(heights) / min(heights) > _LOG_SCALE_FROM:
        decades = math.log10(max(heights) / min(heights))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif chart.scale == "zero":
        axes.set_ylim(bottom=min(0.0, *heights))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: curves.compact(step))
    axes.yaxis.set_major_formatter(
        lambda value, _: f"{100 * value:.4g}%" if chart.is_fraction else curves.compact(value)
    )
    axes.grid(color=GRID, lw=0.8)
    quiet_axes(axes)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Returns a centered moving mean over about 3 % of a line, which does not lag behind it.

    At the ends it is the mean of the half of the window that there is, so that the last value does
    not bend the line.
    """
    window = np.ones(2 * max(2, len(values) // 60) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str] | None = None) -> Figure:
    """Returns the counts of true class (row) against predicted class (column).

    Correct predictions are blue by their fraction of the row. Mistakes are orange on a separate
    scale, because the mistakes of a good model would be invisible on the first scale. With few
    classes, cells show their counts, and each row ends with its recall.

    Args:
      matrix: `[classes, classes]` counts.
      class_names: names in class order; numbers if None.
    """
    matrix = np.asarray(matrix)
    count = len(matrix)
    names = [words(name, _LONGEST_CLASS) for name in (class_names or range(count))]
    totals = matrix.sum(axis=1)
    shares = matrix / np.maximum(totals, 1)[:, None]
    mistakes = np.where(np.eye(count, dtype=bool), 0.0, shares)
    colors = _WRONG_CELLS(np.sqrt(mistakes / max(mistakes.max(), 1e-12)))
    colors[np.diag_indices(count)] = _RIGHT_CELLS(np.diag(shares))
    colors[matrix == 0, 3] = 0.0  # Empty cells are transparent.

    side = float(np.clip(1.6 + 0.46 * count, 4.2, 9.0))
    figure = new_figure(side + 0.6, side)
    axes = figure.add_subplot()
    axes.imshow(colors, interpolation="nearest")
    if count <= _MAX_NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            ink = legible_ink(colors[row, column, :3])
            text = f"{matrix[row, column]:g}"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
        for row in np.flatnonzero(totals).tolist():
            recall = f"{shares[row, row]:.0%}"
            axes.text(count - 0.3, row, recall, va="center", color=MUTED, fontsize=8.5)
        axes.text(count - 0.3, -0.85, "recall", color=MUTED, fontsize=8.5, va="center")
        for edge in np.arange(-0.5, count):
            axes.axhline(edge, color=GRID, lw=0.7)
            axes.axvline(edge, color=GRID, lw=0.7)
    if count <= _MAX_NAMED_CLASSES:
        upright = count <= 12 and max(map(len, names)) <= 4
        axes.set_xticks(range(count), names, rotation=0 if upright else 90)
        axes.set_yticks(range(count), names)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    quiet_axes(axes)
    return figure


def reliability_diagram(count: np.ndarray, accuracy: np.ndarray) -> Figure:
    """Returns the accuracy by confidence (Guo et al. 2017, figure 1), above the number of images.

    Args:
      count: the number of images in each of the bins, which divide 0..1 evenly, `[bins]`.
      accuracy: the share of them that is classified correctly, `[bins]`; NaN in empty bins.
    """
    bins, there = len(count), count > 0
    middles = ((np.arange(bins) + 0.5) / bins)[there]
    style = {"width": 0.9 / bins, "zorder": 2}
    figure = new_figure(5.2, 5.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(middles, accuracy[there], color=SERIES[0], **style)
    upper.plot([0, 1], [0, 1], color=MUTED, lw=1, ls="--", zorder=3)
    upper.set_ylim(0, 1)
    upper.set_ylabel("accuracy", color=INK)
    upper.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    lower.bar(middles, count[there], color=SERIES[5], **style)
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.yaxis.set_major_formatter(lambda value, _: curves.compact(value))
    lower.set_ylabel("images", color=INK)
    lower.set_xlim(0, 1)
    lower.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    lower.set_xlabel("confidence", color=INK)
    for axes in (upper, lower):
        axes.grid(color=GRID, lw=0.8, zorder=0)
        quiet_axes(axes)
    return figure


def image_grid(
    images: Sequence[Image],
    titles: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """Returns images in rows, each with a title and, in a muted color, a note below it.

    Args:
      images: at least one image; sizes may differ.
      titles, notes: one for each image; empty strings take no space.
      columns: the number of images in a row, eight at most. With None the length of the texts
        determines it.
    """
    titles, notes = ([words(text) for text in texts or ()] for texts in (titles, notes))
    longest = max(map(len, [*titles, *notes]), default=0)
    text_width = LETTER_WIDTH * longest + 0.15
    columns = columns or int(PAGE_WIDTH / max(PAGE_WIDTH / 8, text_width))
    columns = max(1, min(columns, len(images)))
    lines = math.ceil(len(images) / columns)
    aspect = float(np.mean([image.shape[0] / image.shape[1] for image in images]))
    text_height = (0.2 if titles else 0) + (0.2 if notes else 0) + 0.08
    width = PAGE_WIDTH / max(columns, 5)
    figure = new_figure(columns * max(width, text_width), lines * (width * aspect + text_height))
    for index, image in enumerate(images):
        axes = figure.add_subplot(lines, columns, index + 1)
        draw_image(axes, image)
        if titles:
            _write_below(axes, titles[index], 0, color=INK, fontweight="bold")
        if notes:
            _write_below(axes, notes[index], 1 if titles else 0, color=MUTED)
    return figure


def _write_below(axes: Axes, text: str, line: int, **style: Any) -> None:
    if text:
        axes.annotate(
            text,
            (0.5, 0),
            xytext=(0, -3 - 12 * line),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8.5,
            **style,
        )


def hardest_mistakes(
    images: Images,
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str] | None = None,
    limit: int = 16,
) -> Figure | None:
    """Returns the wrongly classified images whose true class has the lowest probability.

    Args:
      images: `n` images.
      labels: `[n]` true classes.
      probabilities: `[n, classes]`.
      class_names: names in class order; numbers if None.
      limit: the largest number of images shown.

    Returns None if every image was classified correctly.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    predicted = probabilities.argmax(axis=1)
    of_truth = probabilities[np.arange(len(labels)), labels]
    mistakes = np.flatnonzero(predicted != labels)
    wrong = mistakes[np.argsort(of_truth[mistakes], kind="stable")][:limit].tolist()
    if not wrong:
        return None
    names = class_names or range(probabilities.shape[1])
    names = [one_line(str(name), _LONGEST_CLASS) for name in names]
    return image_grid(
        [images[i] for i in wrong],
        [f"{names[predicted[i]]} {probabilities[i, predicted[i]]:.0%}" for i in wrong],
        [f"true: {names[labels[i]]} {of_truth[i]:.1%}" for i in wrong],
    )


def displayable(image: Image) -> np.ndarray:
    """Returns `image` as uint8 `[h, w, 3]`."""
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8:
        image = image.astype(np.float32)
        low, high = float(np.nanmin(image)), float(np.nanmax(image))
        if low < 0 or high > 1:
            image = (image - low) / max(high - low, 1e-12)
        image = np.round(255 * np.nan_to_num(image)).astype(np.uint8)
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure; sizes are in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.04, hspace=0.04)
    return Figure(figsize=(width, height), layout=layout, facecolor=PAPER)


def draw_image(axes: Axes, image: Image) -> None:
    """Draws an image without axes; the pixels of small images stay sharp."""
    image = displayable(image)
    is_small = max(image.shape[:2]) < 128
    axes.imshow(image, interpolation="nearest" if is_small else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():  # A frame shows where a white picture ends.
        spine.set(color=GRID, linewidth=0.8)


def quiet_axes(axes: Axes) -> None:
    """Removes the frame and makes the labels small and muted."""
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    for label in axes.findobj(matplotlib.text.Text):
        if to_hex(label.get_color()) == "#000000":
            label.set_color(MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.patch.set_visible(False)
