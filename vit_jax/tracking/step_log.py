"""The log of a run while it trains: rows of metrics, the console, and a clock for its parts."""

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from vit_jax.errors import Diverged
from vit_jax.tracking import WITHIN_TRAIN, MetricsLog, Progress, headline
from vit_jax.tracking.callbacks import Callbacks
from vit_jax.types import Array

MAX_IN_FLIGHT = 2
"""Steps handed to the device that may be unfinished: one that runs, one that follows at once."""


def _no_additions(*_: float) -> dict[str, float]:
    return {}


def _no_warnings(*_: object) -> Sequence[str]:
    return ()


class Stopwatch:
    """Counts the seconds spent in named parts of a run, over all its attempts.

    The parts `WITHIN_TRAIN` lie within `train`; the others follow one another.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: dict[str, float] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._running[part] = time.monotonic()
        try:
            yield
        finally:
            self.add(part, time.monotonic() - self._running.pop(part))

    @contextlib.contextmanager
    def in_place_of(self, outer: str, part: str) -> Iterator[None]:
        """Counts the block as `part`, and not as the part `outer`, which is running."""
        started = time.monotonic()
        with self(part):
            yield
        self.add(outer, started - time.monotonic())

    def add(self, part: str, seconds: float) -> None:
        """Adds `seconds` to a part."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def add_all(self, seconds: Mapping[str, float]) -> None:
        """Adds the seconds that an earlier attempt at the same run spent."""
        for part, value in seconds.items():
            self.add(part, value)

    @contextlib.contextmanager
    def gauge(self, part: str, read: Callable[[], float]) -> Iterator[None]:
        """Adds to a part the seconds that another clock, starting at 0, counts during the block."""
        self._gauges[part] = read
        try:
            yield
        finally:
            self.add(part, self._gauges.pop(part)())

    def so_far(self) -> dict[str, float]:
        """Returns all parts, including those that are still running."""
        now = time.monotonic()
        total = dict(self.seconds)
        for part, started in self._running.items():
            total[part] = total.get(part, 0.0) + now - started
        for part, read in self._gauges.items():
            total[part] = total.get(part, 0.0) + read()
        return total

    def total(self) -> float:
        """Returns the seconds of the whole run."""
        return total_seconds(self.so_far())

    def goodput(self) -> float:
        """Returns the fraction of the time in which steps ran, excluding start, input and saves."""
        parts = self.so_far()
        steps = parts.get("train", 0.0) - sum(parts.get(part, 0.0) for part in WITHIN_TRAIN)
        return max(0.0, steps) / max(total_seconds(parts), 1e-9)


def total_seconds(parts: Mapping[str, float]) -> float:
    """Returns the sum of the parts of a run's time, without those that lie within others."""
    return sum(seconds for part, seconds in parts.items() if part not in WITHIN_TRAIN)


class StepLog:
    """Writes rows of the training steps, each while the next step runs.

    Reading a step's metrics blocks until the device has finished the step. A row is therefore held
    back until the following step has been dispatched, so that the device is never idle.

    Only process 0 writes (`is_writer`), but every process must make the same calls, because
    `additions` may compare the processes.

    Args:
      start_step: the step that the run resumes after; later rows of an earlier attempt are dropped.
      total: the number of steps of the run.
      every: the number of steps between rows; the first and the last step have a row too.
      writers: the names of log writers besides `jsonl`.
      config: the run's config as nested dicts, for the writers.
      additions: called in every process with images per second and the fraction of time spent
        waiting for input; returns further values for the row.
      warnings: called with the metrics of a row, without `train/`, and its step; returns lines, of
        which each is shown once.
      callbacks: objects that are told of rows, evaluations and checkpoints, in every process.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        start_step: int,
        total: int,
        every: int,
        batch_size: int,
        max_skipped_steps: int,
        max_spikes: int = sys.maxsize,
        is_writer: bool,
        writers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        additions: Callable[[float, float], Mapping[str, float]] = _no_additions,
        warnings: Callable[[Mapping[str, float], int], Sequence[str]] = _no_warnings,
        callbacks: Sequence[Any] = (),
    ):
        self._total = total
        self._every = max(1, every)
        self._batch_size = batch_size
        self._max_skipped_steps = max_skipped_steps
        self._max_spikes = max_spikes
        self._additions = additions
        self._warnings = warnings
        self._warned: set[str] = set()
        self._callbacks = Callbacks(callbacks)
        self._progress = Progress(total, start_step) if is_writer else None
        self._log = MetricsLog(
            workdir,
            resume_step=start_step,
            writers=writers,
            config=config,
            is_writer=is_writer,
            warn=self._show,
        )
        self._at = start_step
        self._in_flight: collections.deque[Array] = collections.deque()
        self._held: tuple[int, Mapping[str, Array], float] | None = None
        self._last: tuple[int, float, float] | None = None  # step, time of its end, input wait
        self._paused = 0.0

    def step(self, at: int, metrics: Mapping[str, Array], waited: float) -> None:
        """Records the metrics of step `at`, which has been dispatched to the device.

        waited: the seconds spent waiting for input so far.

        Raises:
          Diverged: too many steps in a row, up to an earlier step, were skipped.
        """
        self.flush()
        self._at = at
        # Without a bound the host would dispatch many steps ahead and hold all their batches.
        self._in_flight.append(metrics["loss"])
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._in_flight.popleft().block_until_ready()
        if at == 1 or at % self._every == 0 or at == self._total:
            self._held = (at, metrics, waited)

    def flush(self) -> None:
        """Writes the row that is held back, once its step is done.

        Raises:
          Diverged: more than `max_skipped_steps` steps in a row were not finite.
        """
        if self._held is None:
            return
        (at, metrics, waited), self._held = self._held, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        self.check(at, int(values["bad_steps"]), int(values.get("spikes", 0)))
        row = {f"train/{name}": value for name, value in values.items()}
        if self._last is not None:
            steps = at - self._last[0]
            seconds = max(now - self._last[1] - self._paused, 1e-9)
            speed = steps * self._batch_size / seconds
            waiting = min(1.0, (waited - self._last[2]) / seconds)
            row |= {"train/images_per_sec": speed, "train/input_wait_fraction": waiting}
            row |= self._additions(speed, waiting)
        self._last, self._paused = (at, now, waited), 0.0
        self.write(at, row)
        if self._progress:
            self._progress.update(at, row)
        for line in self._warnings(values, at):
            if line not in self._warned:
                self._warned.add(line)
                self.message(f"warning: {line}")
        self._callbacks("on_step", at, row)

    def check(self, at: int, bad_steps: int, spikes: int = 0) -> None:
        """Raises `Diverged` if too many steps in a row, up to step `at`, were skipped."""
        if spikes > self._max_spikes:
            raise Diverged(
                f"the loss spiked at step {at - spikes + 1} and stayed there ({spikes} steps in a"
                f" row by step {at}); the state was left as it was before"
            )
        if bad_steps > self._max_skipped_steps:
            raise Diverged(
                f"loss or gradient was not finite at step {at - bad_steps + 1}"
                f" ({bad_steps} in a row by step {at}); the state was left as it was before"
            )

    @contextlib.contextmanager
    def paused(self, note: str = "") -> Iterator[None]:
        """Excludes the block, such as an evaluation, from training time, and shows `note` in it."""
        while self._in_flight:
            self._in_flight.popleft().block_until_ready()
        started = time.monotonic()
        if self._progress and note:
            self._progress.update(self._at, {}, note)
        yield
        self._paused += time.monotonic() - started

    def measure_from(self, at: int, waited: float) -> None:
        """Lets the next row's speed be that of the steps after `at`, all of which are done."""
        self._last, self._paused = (at, time.monotonic(), waited), 0.0

    def write(self, at: int, row: Mapping[str, float]) -> None:
        """Writes a row of plain scalars that belongs to step `at`."""
        self._log.write(at, row)

    def evaluated(self, at: int, found: Mapping[str, float], metric: str) -> None:
        """Writes the metrics of an evaluation, `{"SPLIT/METRIC": value}`, and shows one of them.

        metric: the metric that the run is judged by, without its split.
        """
        self.write(at, {f"eval/{name}": value for name, value in found.items()})
        shown = headline(metric, found)
        if shown:
            self.message(f"step {at}: {shown} {found[shown]:.4f}")
        self._callbacks("on_evaluate", at, dict(found))

    def saved(self, at: int) -> None:
        """Tells the callbacks that a checkpoint of step `at` is being written."""
        self._callbacks("on_save", at)

    def bad_images(self, number: int) -> None:
        """Logs the number of unreadable training images that were replaced by others."""
        if number:
            self.write(self._at, {"data/bad_images": number})
            self.message(f"warning: {number} unreadable training images were replaced by others")

    def message(self, text: str) -> None:
        """Shows a line on the console and passes it to the log writers that have `message`."""
        self._show(text)
        self._log.message(text)

    def image(self, name: str, png: bytes) -> None:
        """Passes a picture of the last step to the log writers that have `image`."""
        self._log.image(self._at, name, png)

    def _show(self, text: str) -> None:
        if self._progress:
            self._progress.message(text)

    def mute(self) -> None:
        """Stops the output to the console; rows are still written."""
        self._progress = None

    def sync(self) -> None:
        """Makes all rows so far durable."""
        self._log.flush()

    def close(self) -> None:
        """Closes the console and the files."""
        self._log.close()
        if self._progress:
            self._progress.close()

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
