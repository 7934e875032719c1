"""The end of a run whose metric no longer improves."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax import tasks
from vit_jax.errors import UserError, nearest
from vit_jax.tracking import Metric
from vit_jax.tracking.metrics import best_metric


@dataclasses.dataclass
class EarlyStop:
    """Decides after each evaluation whether training goes on.

    Attributes:
      name: the metric, `SPLIT/METRIC`; "" if runs go on to `config.total`.
      patience: the number of evaluations in a row without a better value that end the run.
      metric: the meaning of the metric; None where there is no name.
      state: `{"metric": name, "best": value, "waited": evaluations}`. Checkpoints store it, so that
        a resumed run ends at the same step.
    """

    name: str
    patience: int
    metric: Metric | None
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: ConfigDict) -> "EarlyStop":
        """Returns what `config.stop` describes.

        Raises:
          UserError: a key is missing, or the direction that is better is unknown.
        """
        name, patience = config.stop.metric, config.stop.patience
        if bool(name) != bool(patience):
            raise UserError(
                "config.stop needs both: metric (SPLIT/METRIC, such as val/accuracy) and patience"
                " (a number of evaluations)"
            )
        metric_info = tasks.metric_info(config.task.name)
        return cls(name, patience, best_metric(name, metric_info, "", "stop.metric"))

    def update(self, found: Mapping[str, float] | None) -> None:
        """Records the metrics of an evaluation.

        Raises:
          UserError: the evaluation does not give the metric.
        """
        if self.metric is None or not found:
            return
        if self.name not in found:
            raise UserError(
                f"config.stop.metric={self.name!r} is no metric; {nearest(self.name, found)}"
            )
        if self.metric.is_better(found[self.name], self.state.get("best")):
            self.state = {"metric": self.name, "best": found[self.name], "waited": 0}
        else:
            waited = self.state.get("waited", 0) + 1
            self.state = {**self.state, "metric": self.name, "waited": waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over the stored state, unless it is that of another metric."""
        self.state = dict(state) if state.get("metric", self.name) == self.name else {}

    @property
    def is_over(self) -> bool:
        """Returns whether the run ends here."""
        return self.metric is not None and self.state.get("waited", 0) >= self.patience

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """Yields steps until the run is over."""
        for step in steps:
            if self.is_over:
                return
            yield step

    def lines(self, step: int) -> list[str]:
        """Returns a line that says why the run ended at this step; [] if it did not end early."""
        if self.metric is None or not self.is_over:
            return []
        best = self.metric.text(self.state["best"]) if "best" in self.state else "never a number"
        return [
            f"step {step}: {self.name} has not improved for {self.state['waited']} evaluations"
            f" (best: {best}); training ends here"
        ]
