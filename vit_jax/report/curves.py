"""Learning curves: which metrics share a chart, and a chart as SVG.

Colours come from the page's CSS variables (`--s0` ... for series, `--grid`, `--muted`), so that one
drawing serves light and dark.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vit_jax.tracking.metrics import Metric, meaning

Row = Mapping[str, int | float]
Points = list[tuple[int, float]]

WIDTH, HEIGHT = 420, 230  # user units of the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 24
_MAX_POINTS = 400  # of one line; a screen shows no more
_LOG_SCALE_FROM = 50  # largest over smallest value
_MAIN_TRAIN = ("train/loss", "train/lr", "train/images_per_sec")
_RUN = ("train/", "device/", "hosts/")


@dataclass(frozen=True)
class Series:
    """One line: its label, its points by step, and how its values are written."""

    label: str
    points: Points
    is_share: bool = False

    @property
    def last(self) -> float:
        return self.points[-1][1]


@dataclass(frozen=True)
class Chart:
    """Lines that share axes.

    is_main: False for those a reader rarely asks for.
    scale: of the vertical axis. "auto" is logarithmic where values span much, "linear" never is,
      and "zero" is linear and starts there, so that noise looks no larger than it is.
    """

    title: str
    series: tuple[Series, ...]
    is_main: bool = True
    scale: str = "auto"

    @property
    def is_share(self) -> bool:
        return all(series.is_share for series in self.series)

    @property
    def needs_legend(self) -> bool:
        """Whether the title alone would not say what the lines are."""
        return len(self.series) > 1 or not self.series[0].label.startswith("train ")


def charts(rows: Sequence[Row], metric_info: Mapping[str, Metric]) -> list[Chart]:
    """Returns the charts that the metrics of `rows` fill, the most telling first.

    metric_info: the declarations of the metrics.
    """
    is_count, is_share = (
        lambda name, unit=unit: meaning(name, metric_info).unit == unit
        for unit in ("count", "fraction")
    )
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    evaluated = [n for n in names if n.startswith("eval/") and not is_count(n)]
    losses = [n for n in ("train/loss", *evaluated) if n in names and kind(n) == "loss"]
    accuracies = [n for n in evaluated if kind(n) == "accuracy"]
    wanted = [("Loss", losses, True, "auto"), ("Accuracy", accuracies, True, "auto")]
    kinds = dict.fromkeys(kind(n) for n in evaluated if n not in losses + accuracies)
    for other in kinds:
        # Beside the accuracy others, such as that of the best five, are details.
        is_main = not (accuracies and "accuracy" in other)
        members = [n for n in evaluated if kind(n) == other]
        wanted.append((sentence(other), members, is_main, "auto"))
    wanted.append(("Learning rate", ["train/lr"], True, "linear"))
    wanted.append(("Images per second", ["train/images_per_sec"], True, "zero"))
    for name in names:
        if name.startswith(_RUN) and name not in _MAIN_TRAIN and not is_count(name):
            scale = "zero" if is_share(name) else "auto"
            wanted.append((sentence(kind(name)), [name], False, scale))
    found = (
        Chart(
            title,
            tuple(s for s in (_series(rows, n, is_share(n)) for n in chosen) if s.points),
            *style,
        )
        for title, chosen, *style in wanted
    )
    return [chart for chart in found if chart.series]


def readable(name: str) -> str:
    """A metric's name in words: `eval/test/ema_accuracy` → `test accuracy, averaged parameters`."""
    parts = name.split("/")
    parts = parts[1:] if parts[0] == "eval" else parts
    words = [word for part in parts for word in part.split("_") if word]
    if is_averaged(name):
        return " ".join(word for word in words if word != "ema") + ", averaged parameters"
    return " ".join(words)


def is_averaged(name: str) -> bool:
    """Whether the metric is of the moving average of parameters."""
    return "ema" in name.replace("/", "_").split("_")


def kind(name: str) -> str:
    """What is measured, apart from where: the last part of the name, `ema` left out."""
    return "_".join(word for word in name.rpartition("/")[2].split("_") if word != "ema")


def sentence(words: str) -> str:
    return words.replace("_", " ").capitalize()


def format_value(value: float, share: bool = False) -> str:
    """A value for people: percentages to a tenth, thousands with commas, else 4 digits."""
    if not math.isfinite(value):
        return "infinite" if math.isinf(value) else "NaN"
    if share and -1 <= value <= 1:
        return f"{100 * value:.1f} %"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def compact(value: float) -> str:
    """A short tick label: `12k`, `1.5M`, `0.25`, `1e-04`."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    if value != 0 and abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def svg(chart: Chart) -> str:
    """`chart` as an `<svg>` element; its data rides along for the page's hover script."""
    frame = Frame.around(chart)
    parts = [*_y_axis(frame, chart.is_share), *_x_axis(frame)]
    for index, series in enumerate(chart.series):
        points = _thinned(series.points)
        is_noisy = len(points) > 60 and series.label == "train loss"
        style = f'style="stroke:var(--s{index % 6})"'
        if is_noisy:
            parts.append(f'<path class="line raw" {style} d="{frame.path(points)}"/>')
            points = _smoothed(points)
        parts.append(f'<path class="line" {style} d="{frame.path(points)}"/>')
        if len(points) == 1:
            x, y = frame.x(points[0][0]), frame.y(points[0][1])
            fill = f"fill:var(--s{index % 6})"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="{fill}"/>')
    parts.append(f'<line class="cursor" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
    data = html.escape(json.dumps(_hover_data(chart, frame)), quote=True)
    label = html.escape(f"{chart.title} by step", quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'data-chart="{data}">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True)
class Frame:
    """Where values land on the drawing."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    is_log: bool

    @classmethod
    def around(cls, chart: Chart) -> "Frame":
        steps = [step for series in chart.series for step, _ in series.points]
        values = [value for series in chart.series for _, value in series.points]
        low, high = min(values), max(values)
        x_range = (min(steps), max(steps))
        if chart.scale == "auto" and low > 0 and high / low > _LOG_SCALE_FROM:
            return cls(x_range, (low / 1.15, high * 1.15), is_log=True)
        low = min(low, 0.0) if chart.scale == "zero" else low
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        floor = max(0.0, low - margin) if low >= 0 else low - margin
        ceiling = min(1.0, high + margin) if chart.is_share and high <= 1 else high + margin
        return cls(x_range, (floor, ceiling), is_log=False)

    def x(self, step: float) -> float:
        first, last = self.x_range
        share = (step - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(s):.1f} {self.y(v):.1f}" for s, v in points)


def _y_axis(frame: Frame, share: bool) -> list[str]:
    ticks = _log_ticks(*frame.y_range) if frame.is_log else _ticks(*frame.y_range, 5)
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        text = f"{100 * tick:.4g}%" if share else compact(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" ')
        parts.append(f'y2="{y:.1f}"/><text x="{_LEFT - 6}" y="{y:.1f}" dy=".32em" ')
        parts.append(f'text-anchor="end">{text}</text>')
    return parts


def _x_axis(frame: Frame) -> list[str]:
    y = HEIGHT - 7
    parts = []
    for tick in _ticks(*frame.x_range, 5):
        x = frame.x(tick)
        anchor = "end" if x > WIDTH - 24 else "middle"
        text = compact(tick)
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>')
    return parts


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(rough))
    unit = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return [index * unit for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 between them where there is room."""
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 2.5 else (1,)
    every = math.ceil(decades / 6)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [f * 10.0**e for e in exponents if e % every == 0 for f in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _series(rows: Sequence[Row], name: str, is_share: bool) -> Series:
    points = [(row["step"], row[name]) for row in rows if name in row]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return Series(readable(name), finite, is_share)


def _thinned(points: Points) -> Points:
    """At most `_MAX_POINTS` points that keep each stretch's extremes: no spike is lost."""
    if len(points) <= _MAX_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / _MAX_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        extremes = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _smoothed(points: Points) -> Points:
    """The mean of about 3 % of the line around each point, so that nothing lags."""
    reach = max(2, len(points) // 60)
    smooth = []
    for index, (step, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        values = [value for _, value in points[index - near : index + near + 1]]
        smooth.append((step, sum(values) / len(values)))
    return smooth


def _hover_data(chart: Chart, frame: Frame) -> dict:
    """For each line: its label and `[x, step, written value]` of its points."""
    return {
        "width": WIDTH,
        "series": [
            {
                "label": series.label,
                "points": [
                    [round(frame.x(s), 1), s, format_value(v, series.is_share)]
                    for s, v in _thinned(series.points)
                ],
            }
            for series in chart.series
        ],
    }
