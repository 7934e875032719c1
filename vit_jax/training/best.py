"""The best evaluation so far, by the metric that `config.checkpoint.keep_best` names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax import tasks
from vit_jax.errors import UserError, nearest
from vit_jax.tracking import Metric
from vit_jax.tracking.metrics import best_metric
from vit_jax.training.early_stop import EarlyStop
from vit_jax.training.evaluate import Evaluator


@dataclasses.dataclass
class Best:
    """The best value so far of one metric.

    Attributes:
      name: the metric, `SPLIT/METRIC`; "" where no checkpoint is kept for being the best.
      metric: its meaning; None where there is no name.
      metric_info: the meaning of all metrics that the task declares.
      early: the end of the run when a metric no longer improves.
      values: `{name: value}`, or empty before the first evaluation. Checkpoints store it, since the
        log may be cut back while another process reads it.
    """

    name: str
    metric: Metric | None
    metric_info: Mapping[str, Metric]
    early: EarlyStop
    values: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: ConfigDict) -> "Best":
        """Returns the metric that `config.checkpoint` names.

        Raises:
          UserError: the direction that is better is unknown.
        """
        metric_info = tasks.metric_info(config.task.name)
        name = config.checkpoint.keep_best
        metric = best_metric(name, metric_info, config.checkpoint.best_is)
        return cls(name, metric, metric_info, EarlyStop.of(config))

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint stores, see `restore`."""
        return {"best": self.values, "stop": self.early.state}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Takes over what a checkpoint stored; earlier versions stored less."""
        self.values = dict(metadata.get("best", {}))
        self.early.restore(metadata.get("stop", {}))

    def update(self, found: Mapping[str, float] | None) -> bool:
        """Records the metrics of an evaluation, and returns whether it is the best so far.

        Raises:
          UserError: the evaluation does not give the metric.
        """
        self.early.update(found)
        if self.metric is None or not found:
            return False
        if self.name not in found:
            raise UserError(
                f"config.checkpoint.keep_best={self.name!r} is no metric;"
                f" {nearest(self.name, found)}"
            )
        if not self.metric.is_better(found[self.name], self.values.get(self.name)):
            return False
        self.values = {self.name: found[self.name]}
        return True


def check_metrics(config: ConfigDict, evaluator: Evaluator) -> None:
    """Raises a `UserError` if a metric that a key names is of no split, before a step is trained.

    The metrics of a split are known only after it has been evaluated.
    """
    endings = ("", "_ema") if config.ema_decay else ("",)
    known = [f"{split.name}{ending}" for split in evaluator.splits for ending in endings]
    keys = {"checkpoint.keep_best": config.checkpoint.keep_best, "stop.metric": config.stop.metric}
    for key, name in keys.items():
        if name and not name.startswith(tuple(f"{split}/" for split in known)):
            raise UserError(
                f"config.{key}={name!r}: write SPLIT/METRIC, where SPLIT is"
                f" {' or '.join(known) or 'one of config.eval.sets, which is empty'}"
            )
