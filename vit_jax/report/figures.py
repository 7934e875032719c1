"""Figures of results: learning curves, confusion matrix, image grids; `inside` has those of models.

Every function returns a `matplotlib.figure.Figure` made without pyplot, so that nothing global is
touched and no display is needed. Text and lines use the inks named here alone, which lets
`recolored` turn a figure into its twin for a dark page.
"""

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence

import matplotlib.text
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

from vit_jax.report import curves
from vit_jax.tracking import Metric

INK, MUTED, GRID, PAPER = "#1b1f24", "#68727e", "#e3e7ec", "#ffffff"
DARK = {INK: "#e9ecf1", MUTED: "#98a3b0", GRID: "#2b323c", PAPER: "#14181e"}
SERIES = ("#2463eb", "#e8700a", "#0d9488", "#9333ea", "#db2777", "#64748b")

DPI = 160
PAGE_WIDTH = 10.4  # inches; the width of the report
_RIGHT_CELLS = LinearSegmentedColormap.from_list("right", ["#dbe7fe", "#2463eb"])
_WRONG_CELLS = LinearSegmentedColormap.from_list("wrong", ["#fde6cf", "#d9480f"])
_MAX_NAMED_CLASSES = 60
_MAX_NUMBERED_CLASSES = 25

Image = np.ndarray
"""`[height, width, 3 or 1]` or `[height, width]`; uint8, or floats (0..1, else stretched to it)."""


def png(figure: Figure) -> bytes:
    """`figure` as a PNG file."""
    if figure.get_layout_engine() is not None:
        # Each drawing moves the layout a little; settled once, a figure and its twin agree.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    return buffer.getvalue()


@contextlib.contextmanager
def recolored(figure: Figure) -> Iterator[Figure]:
    """Within the context, `figure` has the inks of a dark page; after it, its own again."""
    undo = []
    for artist in figure.findobj():
        for prefix in ("color", "facecolor", "edgecolor"):
            getter = getattr(artist, f"get_{prefix}", None)
            setter = getattr(artist, f"set_{prefix}", None)
            if getter is None or setter is None:
                continue
            color = getter()
            with contextlib.suppress(ValueError, TypeError):
                if to_hex(color) in DARK and _is_opaque(color):
                    setter(DARK[to_hex(color)])
                    undo.append((setter, color))
    try:
        yield figure
    finally:
        for setter, color in undo:
            setter(color)


def learning_curves(
    rows: Sequence[Mapping[str, float]], metric_info: Mapping[str, Metric]
) -> Figure | None:
    """The main charts of the metrics log, two a row; None where nothing was logged."""
    charts = [chart for chart in curves.charts(rows, metric_info) if chart.is_main]
    if not charts:
        return None
    columns = min(2, len(charts))
    lines = math.ceil(len(charts) / columns)
    figure = new_figure(5.2 * columns, 3.1 * lines)
    for index, chart in enumerate(charts):
        axes = figure.add_subplot(lines, columns, index + 1)
        for color, series in zip(SERIES * 9, chart.series, strict=False):
            steps, values = zip(*series.points, strict=True)
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, values, color=color, lw=1.5, label=series.label, marker=marker)
        axes.grid(color=GRID, lw=0.8)
        axes.set_title(chart.title, color=INK, fontsize=11, loc="left", fontweight="bold")
        axes.set_xlabel("step", color=MUTED, fontsize=8.5)
        frame = curves.Frame.around(chart)
        axes.set_yscale("log" if frame.is_log else "linear")
        axes.set_ylim(*frame.y_range)
        if chart.is_share:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
        if chart.needs_legend:
            axes.legend(frameon=False, fontsize=8, labelcolor=MUTED)
        quiet_axes(axes)
    return figure


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str] | None = None) -> Figure:
    """Counts of true class (row) against predicted class (column).

    Right answers are blue by the share of their row; mistakes are orange on a scale of their own,
    for on the first scale those of a good model would be invisible. With few classes cells show
    their counts and rows end in their recall.

    Args:
      matrix: `[classes, classes]` counts.
      class_names: names in class order; numbers if None.
    """
    matrix = np.asarray(matrix)
    count = len(matrix)
    names = [str(name) for name in (class_names or range(count))]
    totals = matrix.sum(axis=1)
    shares = matrix / np.maximum(totals, 1)[:, None]
    mistakes = np.where(np.eye(count, dtype=bool), 0.0, shares)
    colors = _WRONG_CELLS(np.sqrt(mistakes / max(mistakes.max(), 1e-12)))
    colors[np.diag_indices(count)] = _RIGHT_CELLS(np.diag(shares))
    colors[matrix == 0, 3] = 0.0  # empty cells show the paper

    side = float(np.clip(1.6 + 0.46 * count, 4.2, 9.0))
    figure = new_figure(side + 0.6, side)
    axes = figure.add_subplot()
    axes.imshow(colors, interpolation="nearest")
    if count <= _MAX_NUMBERED_CLASSES:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            luminance = colors[row, column, :3] @ (0.299, 0.587, 0.114)
            # Not the page's inks, which change on a dark page: cells do not.
            ink = "#fefefe" if luminance < 0.62 else "#1b1f25"
            text = f"{matrix[row, column]:g}"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
        for row in np.flatnonzero(totals):
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


def image_grid(
    images: Sequence[Image],
    captions: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """Images in rows, each with a caption and, in muted ink, a note under it.

    Args:
      images: at least one; sizes may differ.
      captions, notes: one an image; empty strings take no room of their own.
      columns: images a row; as many as their texts leave room for if None, eight at most.
    """
    longest = max((len(text) for text in (*(captions or ()), *(notes or ()))), default=0)
    columns = columns or int(PAGE_WIDTH / max(PAGE_WIDTH / 8, 0.08 * longest + 0.15))
    columns = max(1, min(columns, len(images)))
    lines = math.ceil(len(images) / columns)
    aspect = float(np.mean([image.shape[0] / image.shape[1] for image in images]))
    text = (0.2 if captions else 0) + (0.2 if notes else 0) + 0.08
    width = PAGE_WIDTH / max(columns, 5)
    figure = new_figure(columns * width, lines * (width * aspect + text))
    for index, image in enumerate(images):
        axes = figure.add_subplot(lines, columns, index + 1)
        draw_image(axes, image)
        below = [texts[index] if texts else "" for texts in (captions, notes)]
        for line, (words, ink) in enumerate(zip(below, (INK, MUTED), strict=True)):
            if words:
                axes.annotate(
                    words,
                    (0.5, 0),
                    xytext=(0, -3 - 12 * (line if captions else 0)),
                    xycoords="axes fraction",
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    color=ink,
                    fontsize=8.5,
                    fontweight="bold" if ink == INK else "normal",
                )
    return figure


def hardest_mistakes(
    images: Sequence[Image],
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str] | None = None,
    limit: int = 16,
) -> Figure | None:
    """The wrongly classified images whose true class was given the least probability.

    Args:
      images: `n` images. labels: `[n]` true classes. probabilities: `[n, classes]`.
      class_names: names in class order; numbers if None.
      limit: how many to show at most.

    Returns None where nothing was wrong.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    predicted = probabilities.argmax(axis=1)
    of_truth = probabilities[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(of_truth[wrong], kind="stable")][:limit]
    if not len(wrong):
        return None
    names = [str(name) for name in (class_names or range(probabilities.shape[1]))]
    return image_grid(
        [images[i] for i in wrong],
        [f"said {names[predicted[i]]}  {probabilities[i, predicted[i]]:.0%}" for i in wrong],
        [f"is {names[labels[i]]}  {of_truth[i]:.1%}" for i in wrong],
    )


def displayable(image: Image) -> np.ndarray:
    """`image` as uint8 `[h, w, 3]`."""
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
    """An empty figure, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.04, hspace=0.04)
    return figure


def draw_image(axes: Axes, image: Image) -> None:
    """Draws an image without axes: pixels stay sharp where there are few of them."""
    image = displayable(image)
    is_small = max(image.shape[:2]) < 128
    axes.imshow(image, interpolation="nearest" if is_small else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():  # a white picture ends somewhere, too
        spine.set(color=GRID, linewidth=0.8)


def quiet_axes(axes: Axes) -> None:
    """No frame, small muted labels."""
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    for label in axes.findobj(matplotlib.text.Text):
        if to_hex(label.get_color()) == "#000000":
            label.set_color(MUTED)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.patch.set_visible(False)


def _is_opaque(color) -> bool:
    return isinstance(color, str) or len(color) < 4 or color[3] > 0
