"""The outcome of a finished run, as the `train` command prints it."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping

from vit_jax import tasks, tracking
from vit_jax.checkpoints.store import Store
from vit_jax.errors import Diverged, show
from vit_jax.tracking import Metric, format_duration
from vit_jax.tracking.metrics import meaning
from vit_jax.tracking.plain_text import one_line
from vit_jax.tracking.step_log import Stopwatch
from vit_jax.training.run import Run
from vit_jax.training.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a finished run.

    Attributes:
      results: the metrics of the last evaluation, `{"SPLIT/METRIC": value}`.
      headline: name and value of the metric that the run is judged by, if it was evaluated.
      metric_info: the meaning of the metrics, as the task declares them.
      seconds: time spent in each part of the run, summed over all its attempts.
      report: the path of the HTML report.
    """

    results: dict[str, float]
    headline: tuple[str, float] | None
    metric_info: Mapping[str, Metric]
    seconds: dict[str, float]
    report: str

    @classmethod
    def of(
        cls, workdir: Workdir, run: Run, results: dict[str, float], times: Stopwatch
    ) -> "Outcome":
        """Returns the outcome of a run with these metrics and times."""
        name = tracking.headline(run.task.headline, results)
        headline = (name, results[name]) if name else None
        info = tasks.metric_info(run.config.task.name)
        return cls(results, headline, info, times.seconds, str(workdir.path / "report.html"))

    def describe(self) -> str:
        """Returns the metrics, then three lines: the headline, the time and the report's path.

        Metrics of single classes, such as `val/accuracy/cat`, are left to the report.
        """
        lines = [
            f"{one_line(name):32} {value:.6g}"
            for name, value in self.results.items()
            if name.count("/") < 2
        ]
        if self.headline:
            name, value = self.headline
            lines.append(f"\n{name}: {meaning(name, self.metric_info).text(value)}")
        lines.append(f"training took {format_duration(self.seconds.get('train', 0.0))}")
        lines.append(f"report: {self.report}")
        return "\n".join(lines)


def tell_finished(workdir: Workdir, step: int) -> None:
    """Says that a run was finished before, so that nobody takes its results for new ones."""
    line = f"{workdir.path} was finished before, at step {step}; nothing is trained"
    show(line, sys.stderr)


@contextlib.contextmanager
def advising(store: Store) -> Iterator[None]:
    """Adds to a `Diverged` error which checkpoint is the last, and what to try."""
    try:
        yield
    except Diverged as error:
        store.wait()
        steps = store.steps()
        last = f"the last checkpoint is step {steps[-1]}" if steps else "no checkpoint"
        raise Diverged(
            f"{error}; {last} in {store.directory}. Try a lower optim.lr, a longer"
            " optim.schedule.warmup, optim.clip_norm=1, or tolerate single ones with"
            " --config.max_skipped_steps=5"
        ) from None
