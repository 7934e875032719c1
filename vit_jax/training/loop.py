"""The training of a model, from its config to its report.

config → source → batch → task(model) → step → checkpoint → report
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from vit_jax import plugins
from vit_jax.checkpoints.store import Restored, Store
from vit_jax.config.durations import is_due
from vit_jax.errors import Interrupted, UserError
from vit_jax.models.published import teacher_of
from vit_jax.parallel.host_memory import tidy_heap
from vit_jax.parallel.stop_signal import StopSignal
from vit_jax.tracking.log import writer_names
from vit_jax.tracking.step_log import StepLog, Stopwatch
from vit_jax.training import agreement, pictures, restore, step
from vit_jax.training.best import Best, check_metrics
from vit_jax.training.evaluate import Abandoned, Evaluator
from vit_jax.training.lock import WorkdirLock
from vit_jax.training.opening import open_log, open_store, opening_lines, record_start
from vit_jax.training.outcome import Outcome, advising, tell_finished
from vit_jax.training.profiling import Profiler
from vit_jax.training.run import Run
from vit_jax.training.stages import Stages
from vit_jax.training.workdir import Workdir
from vit_jax.types import Params


def train(
    config: ConfigDict,
    workdir_path: epath.PathLike,
    *,
    profile: str = "",
    started: float | None = None,
    command: Sequence[str] = (),
    callbacks: Sequence[Any] = (),
) -> Outcome:
    """Trains to step `config.total`, or resumes the run in the workdir.

    Args:
      profile: the steps to trace, as `START:STOP`.
      started: the value of `time.monotonic()` when this process began, if it is known.
      command: the words of the command that started the run; empty if Python code did.
      callbacks: see `vit_jax.tracking.callbacks`.

    Raises:
      UserError: the config, the data or the workdir is wrong.
      Interrupted: a signal arrived; the state has been saved.
      Diverged: the loss or the gradient was not finite too often; the last checkpoint is good.
    """
    times = Stopwatch()
    if started is not None:
        times.add("start", time.monotonic() - started)
    with contextlib.ExitStack() as stack:
        with times("setup"):
            profiler = Profiler.parse(profile)
            best = Best.of(config)
            writer_names(config.log)  # Checked before anything is computed.
            plugins.trust(config.to_dict())  # The caller named the code of this config.
            workdir = Workdir.open(workdir_path)
            is_first = jax.process_index() == 0
            lock = stack.enter_context(WorkdirLock(workdir.path, is_holder=is_first))
            store = stack.enter_context(open_store(config, workdir, best))
            newest = max(store.steps(), default=None)
            changed = workdir.check_resume(config) if newest is not None else []
            run = Run.build(config)
            if newest is not None:
                changed += restore.check_data(run, workdir, newest)
            total, stages = run.duration.total, Stages(run)
            if not workdir.is_done():
                # Compiling needs no state, so it runs while the state is made or read from disk.
                stages.prepare((newest or 0) + 1)
            evaluator = Evaluator(config, run.task, run.abstract, run.mesh)
            check_metrics(config, evaluator)
            agreement.check(run, evaluator.sources(), newest)
            profiler.check(total)
            state, restored, merged = restore.restore_or_init(run, store)
            start = restore.check_start(workdir, restored, total)
        if restored:
            times.add_all(restored.metadata["seconds"])
            restored = restore.caught_up(restored, workdir, best)
            if workdir.is_done() and (start == total or best.early.is_over):
                if is_first:
                    tell_finished(workdir, start)
                return Outcome.of(workdir, run, restore.last_evaluation(workdir), times)
            times.add("lost to restart", restore.lost_seconds(workdir, restored))
        if is_first:
            record_start(workdir, run, best, command)
        with open_log(stages, workdir, start, times, callbacks) as log:
            for line in opening_lines(run, restored, merged, changed):
                log.message(line)
            with times("compile"):
                stages.first(start + 1, log)
                tidy_heap()
            with StopSignal() as stop, advising(store):
                trainer = Trainer(
                    run, stages, evaluator, store, log, times, stop, workdir, lock, state,
                    profiler, best,
                )  # fmt: skip
                trainer.train_from(restored)
                reached = trainer.finish()
        if is_first:
            pictures.write_report(workdir.path)
            workdir.mark_done(True, f"step {reached}\n")
    return Outcome.of(workdir, run, trainer.results, times)


@dataclasses.dataclass
class Trainer:
    """Runs the steps of a `Run`, and evaluates and saves between them."""

    run: Run
    stages: Stages
    evaluator: Evaluator
    store: Store
    log: StepLog
    times: Stopwatch
    stop: StopSignal
    workdir: Workdir
    lock: WorkdirLock
    state: step.State
    profiler: Profiler
    best: Best
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    """The metrics of the last evaluation."""

    def train_from(self, restored: Restored | None) -> None:
        """Runs all steps after the restored one, to the end of the run."""
        config, duration = self.run.config, self.run.duration
        evaluate_every = duration(config.eval.every, "eval.every")
        save_every = duration(config.checkpoint.every, "checkpoint.every")
        start, total = restored.step if restored else 0, duration.total
        self.results = restore.last_evaluation(self.workdir)
        if restored:
            self.run_owed_evaluation(restored)
        with (
            self.stages.open_feed(start) as feed,
            self.times("train"),
            self.times.gauge("input wait", lambda: feed.waited),
        ):
            for at in self.best.early.steps(range(start + 1, total + 1)):
                self.profiler.before(at)
                train_step = self.stages.program(at, self.log, self.times, feed.waited)
                with jax.transfer_guard("disallow"):
                    self.state, metrics = train_step(self.state, feed.next_batch())
                self.log.step(at, metrics, feed.waited)
                self.profiler.after(at, metrics["loss"], self.workdir.path)
                stopping = self.stop.agreed(at)
                evaluating = is_due(at, evaluate_every, total)
                found = self.evaluate(at) if evaluating and not stopping else None
                stopping = stopping or (evaluating and found is None)
                improved = self.note_best(at, found)
                saving = is_due(at, save_every, total) or self.store.must_retry()
                saving = saving or self.stages.ends(at)  # The next stage may fail.
                if stopping or improved or saving or self.best.early.is_over:
                    self.save(at, found, owes_evaluation=evaluating and found is None)
                if stopping:
                    self.store.wait()
                    raise Interrupted(
                        f"{self.stop.name}: saved step {at} of {total} in"
                        f" {self.workdir.path}; the same command goes on from there"
                    )
            self.profiler.finish(self.workdir.path)
            self.log.bad_images(feed.num_bad_images)
            self.store.wait()

    def run_owed_evaluation(self, restored: Restored) -> None:
        """Evaluates the restored state if the attempt that saved it was stopped before it could.

        This evaluation never counts as the best, because its checkpoint is already written.

        Raises:
          Interrupted: a signal stopped the evaluation again, and it is still owed.
        """
        if not restored.metadata["owes_evaluation"]:
            return
        with self.times("train"):
            found = self.evaluate(restored.step)
        if found is None:
            raise Interrupted(
                f"{self.stop.name}: step {restored.step} is saved in {self.workdir.path}, its"
                " evaluation is not done; the same command makes up for it"
            )
        self.best.early.update(found)

    def note_best(self, at: int, found: dict[str, float] | None) -> bool:
        """Returns whether this evaluation is the best so far; saves the state before an error."""
        try:
            return self.best.update(found)
        except UserError:
            self.save(at, None, owes_evaluation=False)
            self.store.wait()
            raise

    def evaluate(self, at: int) -> dict[str, float] | None:
        """Returns the metrics of the current state on every split, or None if a signal stopped it.

        With a moving average of the parameters, `NAME_ema/...` are the metrics of the average.
        """
        self.log.flush()
        # Only a process that is alone may leave early, because the others would wait for it.
        should_stop = self.stop.asked if jax.process_count() == 1 else lambda: False
        with self.log.paused("evaluating"), self.times("eval"):
            try:
                found = self.evaluator.run(self.params(), should_stop=should_stop)
                if self.state.ema is not None:
                    found |= self.evaluator.run(
                        self.state.ema, suffix="_ema", should_stop=should_stop
                    )
            except Abandoned:
                return None
            tidy_heap()
        self.log.evaluated(at, found, self.run.task.headline)
        self.results = found
        return found

    def params(self) -> Params:
        """Returns the parameters to evaluate."""
        return self.run.evaluation_params(self.state)

    def save(self, at: int, metrics: dict[str, float] | None, *, owes_evaluation: bool) -> None:
        """Starts a checkpoint of the current state, unless it is bad or the workdir is gone."""
        self.log.flush()
        self.lock.check()
        losses = self.state.losses
        bad_steps, spikes = jax.device_get((self.state.bad_steps, losses.in_a_row if losses else 0))
        self.log.check(at, int(bad_steps), int(spikes))
        with self.log.paused(), self.times("save"):
            self.log.sync()
            metadata = {
                "seconds": self.times.so_far(),
                "owes_evaluation": owes_evaluation,
                **self.best.state(),
            }
            self.store.save(at, self.state, metadata, metrics)
            self.log.saved(at)

    def finish(self) -> int:
        """Draws the report's pictures, logs the times, and returns the step that was reached."""
        reached = int(jax.device_get(self.state.step))
        for line in self.best.early.lines(reached):
            self.log.message(line)
        if self.run.config.log.pictures and self.evaluator.splits:
            published = self.params() if self.state.ema is None else self.state.ema
            student = self.state.params if teacher_of(self.state.task_state) else None
            with self.times("report"):
                pictures.write_sections(
                    self.workdir.path,
                    self.evaluator,
                    self.run.task,
                    published,
                    self.log,
                    student=student,
                )
        self.log.write(reached, {"model/num_params": self.run.num_params()})
        self.log.write(reached, {f"time/{part}": x for part, x in self.times.seconds.items()})
        return reached
