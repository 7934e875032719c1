"""The stages of a run, whose settings change at given steps (`config.stages`).

A stage is a `Run` of its own on the state that the one before it leaves, just as if the run had
been stopped and resumed with other settings. Batches, random keys and schedules depend on the step
of the whole run, so neither the boundaries nor interruptions change what a step computes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import jax
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import data, models
from vit_jax.checkpoints.store import flatten
from vit_jax.config import stages as settings_lib
from vit_jax.errors import UserError
from vit_jax.parallel import accelerators
from vit_jax.tracking.step_log import StepLog, Stopwatch
from vit_jax.training import background
from vit_jax.training.feed import DeviceFeed
from vit_jax.training.run import Run, TrainStep
from vit_jax.types import HostBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """Some consecutive steps of a run that have the same settings.

    Attributes:
      name: its name in `config.stages`; "" for the config itself.
      start, end: it has the steps `start + 1` to `end`.
      run: the parts of the run with its settings.
    """

    name: str
    start: int
    end: int
    run: Run

    @functools.cached_property
    def train_flops_per_example(self) -> int:
        """Returns the FLOPs of a training step for each example."""
        return self.run.train_flops_per_example()

    def __str__(self) -> str:
        return f"{settings_lib.title(self.name)}, steps {self.start + 1:,} to {self.end:,}"


def stages_of(run: Run) -> list[Stage]:
    """Returns the stages of a run in the order in which they are trained.

    The last one has the settings of `run` itself.

    Raises:
      UserError: a stage does not end within the run, or has another state than the run.
    """
    ends: dict[int, str] = {}
    total = run.duration.total
    for name, stage in run.config.stages.items():
        key = f"stages.{name}.{settings_lib.UNTIL}"
        end = run.duration(stage[settings_lib.UNTIL], key)
        if end >= total or end in ends:
            other = f"stage {ends[end]}" if end in ends else f"the run, of {total:,} steps"
            raise UserError(
                f"config.{key}={stage[settings_lib.UNTIL]!r} is step {end:,}: write a time before"
                f" the end of {other}, or 0 to leave the stage out"
            )
        if end:
            ends[end] = name
    found, start = [], 0
    for end, name in sorted(ends.items()):
        own = settings_lib.settings(run.config.to_dict(), name)
        try:
            of_stage = run.with_settings(config_lib.validate(ConfigDict(own)))
        except UserError as error:
            raise UserError(f"config.stages.{name}: {error}") from error
        _check_task(name, run)
        _check_state(name, of_stage, run)
        found.append(Stage(name, start, end, dataclasses.replace(of_stage, start=start)))
        start = end
    return [*found, Stage("", start, total, dataclasses.replace(run, start=start))]


def _check_task(name: str, run: Run) -> None:
    """Raises a `UserError` if a stage sets a field of the task that only evaluation reads."""
    for field in run.config.stages[name].get("task", {}):
        if field in run.task.of_evaluation:
            raise UserError(
                f"config.stages.{name}.task.{field}: a stage cannot change it, because only"
                f" evaluation reads it; write config.task.{field}, for the whole run"
            )


def _check_state(name: str, of_stage: Run, run: Run) -> None:
    """Raises a `UserError` unless the state of a stage has the arrays of the run's state."""
    own, wanted = (
        {key: (leaf.shape, leaf.dtype) for key, leaf in flatten(one.abstract).items()}
        for one in (of_stage, run)
    )
    for key in {**wanted, **own}:
        if own.get(key) != wanted.get(key):
            told, expected = (
                f"{found[key][1]}{list(found[key][0])}" if key in found else "none"
                for found in (own, wanted)
            )
            raise UserError(
                f"config.stages.{name}: all stages must have the arrays of one state, but {key} is"
                f" {told} in this stage and {expected} after the last; {_advice(key, run)}"
            )


def _advice(key: str, run: Run) -> str:
    """Returns what to write so that an array is the same in all stages."""
    stride = models.token_stride(models.backbone_of(run.task.model))
    if key.endswith("pos_embed") and stride:
        rows, columns = (run.task.image_spec.shape[axis] // stride[axis] for axis in (0, 1))
        return (
            f"write config.model.position_grid=[{rows},{columns}], the grid for which the positions"
            " are kept, or take a FlexiViT"
        )
    if ".patch_embed." in key:
        return "take a FlexiViT, whose parameters do not depend on model.patch_size"
    return next(
        (advice for start, advice in _ADVICE.items() if key.startswith(start)),
        "leave out what changes it",
    )


_ADVICE = {
    "ema.": "a stage may change ema_decay, but not switch the average on or off",
    "losses.": "a stage may change spikes, but not switch the guard on or off",
    "opt_state.": (
        "take optim.freeze_until where parameters are frozen for a time, and write optim.args for"
        " the whole run"
    ),
}


class Batches:
    """The batches of consecutive stages, in host memory.

    A stage's pipeline is opened when the last batch of the stage before has been read.

    Args:
      stages: those whose batches are wanted.
      start_step: the step after which the batches begin, in the first of the stages.
    """

    def __init__(self, stages: Sequence[Stage], start_step: int):
        self._stages = stages
        self._start_step = start_step
        self._opened: list[data.Batches] = []
        self._is_closed = False

    def __iter__(self) -> Iterator[HostBatch]:
        for stage in self._stages:
            if self._is_closed:
                return
            start = max(stage.start, self._start_step)
            batches = stage.run.batches(start, stage.end)
            self._opened.append(batches)
            yield from batches
            batches.close()

    @property
    def num_bad_images(self) -> int:
        """Returns the number of unreadable images that other images have replaced so far."""
        return sum(batches.num_bad_images for batches in self._opened)

    def close(self) -> None:
        """Stops the threads of all pipelines. No further one is opened."""
        self._is_closed = True
        for batches in self._opened:
            batches.close()


class Stages:
    """The stages of a run, each with its compiled step.

    The step of a stage is compiled in the background while the stage before it trains.

    run: the run of the config itself.
    """

    def __init__(self, run: Run):
        self.run = run
        self.stages = stages_of(run)
        self._compiling: dict[str, Future[jax.stages.Compiled]] = {}
        # Rows have the utilization of devices whose peak is known.
        device = run.mesh.devices.flat[0]
        self._counts_flops = accelerators.of_kind(device.device_kind) is not None
        self._now: Stage | None = None

    def at(self, step: int) -> Stage:
        """Returns the stage of a step; the last one for later steps."""
        return next((one for one in self.stages if step <= one.end), self.stages[-1])

    def prepare(self, step: int) -> None:
        """Starts to trace and to compile, on its own thread, the program of the stage of a step."""
        stage = self.at(step)
        if stage.name not in self._compiling:
            self._compiling[stage.name] = background.start(stage.run.compile_step)
            if self._counts_flops:  # They are traced, for which the loop has no time.
                background.start(lambda: stage.train_flops_per_example)

    def compiled(self, step: int) -> TrainStep:
        """Waits for the compiled program of a step, and returns it."""
        self.prepare(step)
        return self._compiling[self.at(step).name].result()

    def first(self, step: int, log: StepLog) -> TrainStep:
        """Returns the compiled program of the first step, and says so in `log` if it must wait."""
        self.prepare(step)
        if not self._compiling[self.at(step).name].done():
            log.message("compiling the training step, which may take minutes for a large model")
        return self.compiled(step)

    def ends(self, step: int) -> bool:
        """Returns whether a step is the last one of its stage."""
        return step == self.at(step).end

    def program(self, step: int, log: StepLog, times: Stopwatch, waited: float) -> TrainStep:
        """Returns the compiled program of a step. The first step of a stage begins the stage.

        Args:
          log: the log of the run, which measures the speed of each stage by itself.
          times: the clock of the run; the wait for the compiler is not a part of its training.
          waited: the seconds spent waiting for input so far.
        """
        stage = self.at(step)
        if stage is not self._now:
            if self._now:
                self._leave(self._now, stage, log, times, waited)
            if len(self.stages) > 1:
                log.message(str(stage))
            self._now = stage
            self.prepare(stage.end + 1)
        self._check_next(stage)
        return self.compiled(step)

    def _check_next(self, stage: Stage) -> None:
        """Raises the error of the next stage's compiler at once, not when that stage begins."""
        ahead = self._compiling.get(self.at(stage.end + 1).name)
        if ahead and ahead.done():
            ahead.result()

    def _leave(
        self, before: Stage, stage: Stage, log: StepLog, times: Stopwatch, waited: float
    ) -> None:
        log.flush()  # The row that is held back has the FLOPs of the stage before.
        del self._compiling[before.name]
        with log.paused("compiling"), times.in_place_of("train", "compile"):
            self.compiled(stage.end)
        log.measure_from(stage.start, waited)

    def open_feed(self, start_step: int) -> DeviceFeed:
        """Returns the feed of this process's rows of all batches after `start_step`."""
        left = [stage for stage in self.stages if stage.end > start_step]
        return self.run.feed_of(Batches(left, start_step))

    def train_flops_per_example(self) -> int:
        """Returns the FLOPs of a training step, for each example, in the stage that is trained."""
        return (self._now or self.stages[-1]).train_flops_per_example
