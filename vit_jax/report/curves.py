"""Learning curves: the grouping of metrics into charts, their order and the format of values."""

import collections
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vit_jax.tracking.metrics import Metric, meaning
from vit_jax.tracking.plain_text import one_line

Row = Mapping[str, int | float]
Points = list[tuple[int, float]]

_MAIN_TRAIN = ("train/loss", "train/lr", "train/images_per_sec")
_RUN = ("train/", "device/", "hosts/")

_TRAIN_LOSS_NOTE = (
    "The training loss is that of augmented images, with mixed and smoothed labels and dropout if"
    " the config asks for them; evaluation has none of these. So the first may lie far above the"
    " second in a good run."
)


@dataclass(frozen=True)
class Series:
    """A line of a chart: its label, its finite points by step, and whether they are fractions.

    Attributes:
      metric: the name of the metric in the log; "" for what is no metric.
    """

    label: str
    points: Points
    is_fraction: bool = False
    metric: str = ""

    @property
    def last(self) -> float:
        """Returns the value at the last step."""
        return self.points[-1][1]


@dataclass(frozen=True)
class Chart:
    """Lines that share axes.

    Attributes:
      is_main: False for a chart that a reader rarely asks for.
      scale: the vertical axis. "auto" is logarithmic where values span much, "linear" never is, and
        "zero" is linear and starts at zero, so that noise looks no larger than it is.
    """

    title: str
    series: tuple[Series, ...]
    is_main: bool = True
    scale: str = "auto"

    @property
    def note(self) -> str:
        """Returns a sentence for a reader who compares the lines; "" if there is none to say."""
        labels = [series.label for series in self.series]
        return _TRAIN_LOSS_NOTE if labels[0] == "train loss" and len(labels) > 1 else ""

    @property
    def is_fraction(self) -> bool:
        """Returns whether the vertical axis shows percentages."""
        return all(series.is_fraction for series in self.series)

    @property
    def needs_legend(self) -> bool:
        """Returns whether the lines need labels in addition to the title."""
        return len(self.series) > 1 or not self.series[0].label.startswith("train ")


def charts(rows: Sequence[Row], metric_info: Mapping[str, Metric]) -> list[Chart]:
    """Returns the charts of the metrics in `rows`, the most important chart first.

    metric_info: the declarations of the metrics. Counts have no curve.
    """
    units = {
        name: meaning(name, metric_info).unit for row in rows for name in row if name != "step"
    }
    names = [name for name, unit in units.items() if unit != "count"]
    wanted = _of_evaluations([name for name in names if name.startswith("eval/")])
    if "train/loss" in names:
        wanted.setdefault("Loss", ([], True, "auto"))[0].insert(0, "train/loss")
        wanted = {"Loss": wanted.pop("Loss"), **wanted}
    wanted[_free("Learning rate", "train/lr", wanted)] = (["train/lr"], True, "linear")
    rate = "train/images_per_sec"
    wanted[_free("Images per second", rate, wanted)] = ([rate], True, "zero")
    for name in names:
        if name.startswith(_RUN) and name not in _MAIN_TRAIN:
            scale = "zero" if units[name] == "fraction" else "auto"
            wanted[_free(sentence(kind(name)), name, wanted)] = ([name], False, scale)
    found = []
    for title, (members, is_main, scale) in wanted.items():
        series = [
            Series(label, _finite(rows, name), units.get(name) == "fraction", name)
            for name, label in labels(members).items()
        ]
        series = [one for one in series if one.points]
        if series:
            found.append(Chart(title, tuple(series), is_main, scale))
    return found


def _of_evaluations(names: Sequence[str]) -> dict[str, tuple[list[str], bool, str]]:
    """Returns title → (metrics, whether it is a main chart, scale), with loss and accuracy first.

    The members of a family, such as `iou/CLASS`, share one chart.
    """
    first = {kind: [n for n in names if _family(n) == kind] for kind in ("loss", "accuracy")}
    found = {sentence(kind): (own, True, "auto") for kind, own in first.items() if own}
    for family in dict.fromkeys(_family(name) for name in names):
        if family not in first:
            # If there is a plain accuracy, other accuracies, such as top-5, are details.
            is_detail = "/" in family or (bool(first["accuracy"]) and "accuracy" in family)
            members = [name for name in names if _family(name) == family]
            title = f"{sentence(family[:-2])} of each class" if "/" in family else sentence(family)
            title = _free(title, members[0], found)
            found[title] = (members, not is_detail, "auto")
    return found


def _free(title: str, name: str, taken: Container[str]) -> str:
    """Returns the title of a metric's chart, or a longer one if another chart has that title."""
    return next((one for one in (title, sentence(readable(name))) if one not in taken), name)


def _family(name: str) -> str:
    """Returns a metric's family: `eval/val/ema_loss` → `loss`, `eval/val/iou/road` → `iou/*`."""
    metric = name.removeprefix("eval/").partition("/")[2]
    return f"{metric.rpartition('/')[0]}/*" if "/" in metric else kind(name)


def readable(name: str) -> str:
    """Returns a metric's name in words.

    For example, `eval/test/ema_accuracy` gives `test accuracy, averaged parameters`.
    """
    parts = name.split("/")
    parts = parts[1:] if parts[0] == "eval" else parts
    words = [word for part in parts for word in part.split("_") if word]
    if "ema" in words:
        words = [word for word in words if word != "ema"]
        return one_line(" ".join(words)) + ", averaged parameters"
    return one_line(" ".join(words))


def labels(names: Iterable[str]) -> dict[str, str]:
    """Returns the words of each metric, or its name where two metrics have the same words."""
    words = {name: readable(name) for name in names}
    counts = collections.Counter(words.values())
    return {name: one if counts[one] == 1 else one_line(name) for name, one in words.items()}


def kind(name: str) -> str:
    """Returns the last part of a metric's name, without the split and without `ema`."""
    return "_".join(word for word in name.rpartition("/")[2].split("_") if word != "ema")


def sentence(words: str) -> str:
    """Returns a name as a title: `grad_norm` → `Grad norm`."""
    words = words.replace("_", " ")
    return words[:1].upper() + words[1:]


def format_value(value: float, is_fraction: bool = False) -> str:
    """Returns a value as text: percentages to a tenth, thousands with commas, else 4 digits."""
    if not math.isfinite(value):
        return "infinite" if math.isinf(value) else "NaN"
    if is_fraction and -1 <= value <= 1:
        return f"{100 * value:.1f} %"
    if 1000 <= abs(value) < 1e15 or (abs(value) < 1000 and value == int(value)):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def compact(value: float) -> str:
    """Returns a short label of an axis: `12k`, `1.5M`, `0.25`, `1e-4`."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1000 * 1e9:
            return f"{value / size:.3g}{suffix}"
    if value != 0 and not 0.01 <= abs(value) < 1000:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}" if exponent else mantissa
    return f"{value:.3g}"


def _finite(rows: Sequence[Row], name: str) -> Points:
    points = [(int(row["step"]), row[name]) for row in rows if name in row]
    return [(step, value) for step, value in points if math.isfinite(value)]
