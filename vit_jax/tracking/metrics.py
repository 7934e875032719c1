"""The meaning of metrics: the direction that is better, and the unit in which they are shown.

A task declares its metrics as `metric_info`, for example:

    metric_info = {
        "accuracy": SCORE,
        "rmse": Metric(higher_is_better=False, unit="pixels"),
        "iou/*": SCORE,
        "num_examples": COUNT,
    }

A key is the name of a metric, or a pattern with `*` for a family of them. The names in an
evaluation are `SPLIT/METRIC`, and `eval/SPLIT/METRIC` in the metrics log.
"""

import fnmatch
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vit_jax.errors import UserError, nearest

logger = logging.getLogger(__name__)

WITHIN_TRAIN = ("input wait", "eval", "save")
"""The parts of a run's time (`time/...`) that lie within its part `train`."""

BEST_IS = {"highest": True, "lowest": False}
"""Values of `config.checkpoint.best_is`, and whether higher is better under each."""


class Metric(NamedTuple):
    """The meaning of one metric.

    Attributes:
      higher_is_better: None for a number that is neither good nor bad, such as a count.
      unit: "fraction" for a part of one, which is shown as a percentage; "count"; "" for a plain
        number; any other text, such as "pixels", is written after the number.
    """

    higher_is_better: bool | None = None
    unit: str = ""

    def is_better(self, value: float, best: float | None) -> bool:
        """Returns whether `value` is better than `best`, which is None at first. NaN never is."""
        if self.higher_is_better is None or math.isnan(value):
            return False
        if best is None or math.isnan(best):
            return True
        return value > best if self.higher_is_better else value < best

    def text(self, value: float) -> str:
        """Returns `value` as text, such as `95.83%`, `12.5` or `3.2 pixels`."""
        if self.unit == "fraction":
            return f"{value:.2%}"
        if self.unit == "count":
            return f"{value:,.0f}"
        return f"{value:.6g} {self.unit}".rstrip()


SCORE = Metric(higher_is_better=True, unit="fraction")
LOSS = Metric(higher_is_better=False)
COUNT = Metric(unit="count")

PROBES = {"knn_*": SCORE, "fewshot_*": SCORE, "linear": SCORE, "sgd_*": SCORE}
"""The metrics of `config.eval.probes`, for any task."""

RUN_METRICS = {
    "train/mfu": SCORE,
    "train/goodput": SCORE,
    "train/input_wait_fraction": Metric(higher_is_better=False, unit="fraction"),
    "hosts/input_wait_fraction_max": Metric(higher_is_better=False, unit="fraction"),
    "train/run_seconds": COUNT,
    "train/epoch": COUNT,
    "train/examples_seen": COUNT,
}
"""The metrics that every run logs, whatever its task."""

BEFORE_DECLARATIONS = {
    "AP*": SCORE,
    "AR": SCORE,
    "*miou": SCORE,
    "iou/*": SCORE,
    "*accuracy": SCORE,
    "*_recall*": SCORE,
    "caption_among_*": SCORE,
    "num_*": COUNT,
}
"""The metrics of our tasks when `config.json` did not yet hold their declarations."""


def declared(name: str, metric_info: Mapping[str, Metric]) -> Metric | None:
    """Returns the declaration of a metric, or None.

    An exact name takes precedence over a pattern, and an earlier pattern over a later one.

    Args:
      name: `METRIC`, `SPLIT/METRIC` or `eval/SPLIT/METRIC`. The name of a split, which is a user's,
        says nothing of the metric. A metric that has a `/` of its own, such as `iou/cat`, comes
        with its split.
    """
    if name in RUN_METRICS:
        return metric_info.get(name)
    parts = name.removeprefix("eval/").split("/")
    for first in range(len(parts) > 1, len(parts)):
        metric = "/".join(parts[first:])
        if metric in metric_info:
            return metric_info[metric]
        for pattern, info in metric_info.items():
            if fnmatch.fnmatchcase(metric, pattern):
                return info
    return None


def meaning(name: str, metric_info: Mapping[str, Metric]) -> Metric:
    """Returns the declaration of the metric `name`, or a default if it is not declared.

    The default has a direction only if the name ends in `loss`.
    """
    found = declared(name, metric_info)
    if found is not None:
        return found
    return Metric(higher_is_better=False if name.endswith("loss") else None)


def best_metric(
    name: str, metric_info: Mapping[str, Metric], best_is: str, key: str = "checkpoint.keep_best"
) -> Metric | None:
    """Returns the meaning of the metric that a key of the config names.

    Args:
      name: `SPLIT/METRIC`; "" for none, which gives None.
      metric_info: the declarations of the task.
      best_is: `config.checkpoint.best_is`: highest, lowest, or "" for the task's declaration.
      key: the key of the config, for messages.

    Raises:
      UserError: the direction that is better is unknown.
    """
    if not name:
        return None
    found = meaning(name, metric_info)
    if best_is:
        if best_is not in BEST_IS:
            raise UserError(f"config.checkpoint.best_is={best_is!r}: write {' or '.join(BEST_IS)}")
        return found._replace(higher_is_better=BEST_IS[best_is])
    if found.higher_is_better is None:
        split = "".join(name.partition("/")[:2]) if "/" in name else ""
        known = [split + metric for metric in metric_info]
        hint = nearest(name, known) if known else "the task declares no metrics"
        raise UserError(
            f"config.{key}={name!r}: the task does not say whether higher or lower is better;"
            f" {hint}"
            + (
                ", or write config.checkpoint.best_is=highest or lowest"
                if key == "checkpoint.keep_best"
                else ""
            )
        )
    if declared(name, metric_info) is None:
        logger.warning(
            "config.%s=%s: the task does not say which direction is better; the lowest is taken,"
            " because the name ends in loss",
            key,
            name,
        )
    return found


def headline(metric: str, names: Iterable[str]) -> str | None:
    """Returns the name of the score of a model: `metric` on the first split that has it.

    The averaged parameters take precedence if there are any, because they are the ones to deploy.
    The choice does not depend on the values, because a choice by test score would be biased.
    """
    found = [name for name in names if name.endswith(f"/{metric}")]
    averaged = [name for name in found if name.split("/")[-2].endswith("_ema")]
    return next(iter(averaged or found), None)


def as_json(metric_info: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """Returns the declarations in the form in which `config.json` stores them for the report."""
    return {name: info._asdict() for name, info in metric_info.items()}


def from_json(stored: Any) -> dict[str, Metric]:
    """Returns the declarations that `as_json` stored, and those that every run has.

    Entries that are not valid declarations are left out. `stored` is None for a run of an earlier
    version, which stored no declarations.
    """
    if not isinstance(stored, Mapping):
        return {**RUN_METRICS, **(BEFORE_DECLARATIONS if stored is None else {})}
    found = {
        name: Metric(info.get("higher_is_better"), str(info.get("unit", "")))
        for name, info in stored.items()
        if isinstance(info, Mapping) and info.get("higher_is_better") in (True, False, None)
    }
    return {**RUN_METRICS, **found}
