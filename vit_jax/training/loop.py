"""Training, read top to bottom.

config → source → batch → task(model) → step → checkpoint → report
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax import report, tasks, tracking
from vit_jax.checkpoints import MergeReport
from vit_jax.checkpoints.store import Restored, Store
from vit_jax.errors import Diverged, Interrupted, UserError, nearest
from vit_jax.parallel import sharding
from vit_jax.parallel.processes import StopSignal, take_gaps
from vit_jax.tracking import Metric, format_duration, read_metrics
from vit_jax.tracking.log import writer_names
from vit_jax.tracking.metrics import best_metric, meaning
from vit_jax.tracking.step_log import StepLog, Stopwatch, total_seconds
from vit_jax.training import initial_state, pictures, step
from vit_jax.training.evaluate import Abandoned, Evaluator
from vit_jax.training.profiling import Profiler
from vit_jax.training.run import Run, TrainStep
from vit_jax.training.utilisation import Monitor
from vit_jax.training.workdir import Workdir
from vit_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run: the last evaluation, seconds by part over all attempts, the report's file."""

    results: dict[str, float]
    headline: tuple[str, float] | None
    metric_info: Mapping[str, Metric]
    seconds: dict[str, float]
    report: str

    @classmethod
    def of(
        cls, workdir: Workdir, run: Run, results: dict[str, float], times: Stopwatch
    ) -> "Outcome":
        name = tracking.headline(run.task.headline, results)
        headline = (name, results[name]) if name else None
        info = tasks.metric_info(run.config.task.name)
        return cls(results, headline, info, times.seconds, str(workdir.path / "report.html"))

    def describe(self) -> str:
        """All metrics, then what a person wants to know in three lines."""
        lines = [f"{name:32} {value:.6g}" for name, value in self.results.items()]
        if self.headline:
            name, value = self.headline
            lines.append(f"\n{name}: {meaning(name, self.metric_info).text(value)}")
        lines.append(f"training took {format_duration(self.seconds.get('train', 0.0))}")
        lines.append(f"report: {self.report}")
        return "\n".join(lines)


def train(
    config: ConfigDict,
    workdir_path: str,
    *,
    profile: str = "",
    started: float | None = None,
) -> Outcome:
    """Trains, or resumes what is in the workdir, to `config.total`.

    profile: steps to trace, as `START:STOP`. started: `time.monotonic()` when this run's process
    began, where it is known.

    Raises:
      UserError: the config, the data or the workdir is wrong.
      Interrupted: a signal arrived; the state has been saved.
      Diverged: loss or gradient was not finite too often in a row; the last checkpoint is good.
    """
    times = Stopwatch()
    if started is not None:
        times.add("start", time.monotonic() - started)
    with times("setup"):
        profiler = Profiler.parse(profile)
        writer_names(config.log)  # Before anything is computed.
        metric_info = tasks.metric_info(config.task.name)
        best = best_metric(config.checkpoint.keep_best, metric_info, config.checkpoint.best_is)
        workdir = Workdir.open(workdir_path)
        store = Store(
            workdir.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            least_is_best=best is not None and not best.higher_is_better,
            retries=config.checkpoint.retries,
        )
        changed = workdir.check_resume(config) if store.steps() else []
        run = Run.build(config)
        # Tracing and compiling need no state: they go on while it is made, or read from disk.
        background = ThreadPoolExecutor(1, thread_name_prefix="vit-compile")
        compiling = background.submit(run.compile_step) if not workdir.is_done() else None
        evaluator = Evaluator(config, run.task, run.abstract, run.mesh)
        check_keep_best(config, evaluator)
        profiler.check(run.duration.total)
        state, restored, merged = restore_or_init(run, store)
    if workdir.is_done() and restored and restored.step == run.duration.total:
        times.add_all(restored.metadata["seconds"])
        return Outcome.of(workdir, run, last_evaluation(workdir), times)
    if restored and restored.step > run.duration.total:
        raise UserError(
            f"{workdir.path} is at step {restored.step}, and config.total={run.duration.total}"
            " ends before it: give more steps, or another workdir"
        )
    if jax.process_index() == 0:
        workdir.mark_done(False)
        workdir.write_config(config, run.task.info, run.task.headline, metric_info)
    start_step = restored.step if restored else 0
    if restored:
        times.add("lost to restart", lost_seconds(workdir, restored))
        times.add_all(restored.metadata["seconds"])
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open_log(run, workdir, start_step, times))
        stack.callback(store.close)
        stop = stack.enter_context(StopSignal())
        for line in opening_lines(run, restored, changed, merged):
            log.message(line)
        compiled = compiling.result if compiling else run.compile_step
        trainer = Trainer(
            run, compiled, evaluator, store, log, times, stop, workdir, state, profiler, best
        )
        try:
            trainer.train_from(restored)
        except Diverged as error:
            raise Diverged(f"{error}; {advice(store)}") from None
        if config.log.pictures and evaluator.splits:
            with times("report"):
                pictures.write_sections(
                    workdir.path, evaluator, run.task, trainer.published_params()
                )
        log.write(run.duration.total, {"model/num_params": run.num_params()})
        log.write(run.duration.total, {f"time/{k}": v for k, v in times.seconds.items()})
    if jax.process_index() == 0:
        report.write_report(workdir.path, is_done=True)
        workdir.mark_done(True, f"step {run.duration.total}\n")
    return Outcome.of(workdir, run, trainer.results, times)


@dataclasses.dataclass
class Trainer:
    """Runs the steps of a `Run` and does what is due between them."""

    run: Run
    compiled: Callable[[], TrainStep]
    evaluator: Evaluator
    store: Store
    log: StepLog
    times: Stopwatch
    stop: StopSignal
    workdir: Workdir
    state: step.State
    profiler: Profiler
    best_metric: Metric | None
    """The meaning of the metric that `checkpoint.keep_best` names."""
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    """What `checkpoint.keep_best` names, at its best."""

    def train_from(self, restored: Restored | None) -> None:
        """All steps after the restored one, to the end of the run."""
        config, duration = self.run.config, self.run.duration
        evaluate_every = duration(config.eval.every, "eval.every")
        save_every = duration(config.checkpoint.every, "checkpoint.every")
        start, total = restored.step if restored else 0, duration.total
        self.results = last_evaluation(self.workdir)
        if restored:
            self.make_up_for(restored)
        if start == total:
            return

        with self.times("compile"):
            train_step = self.compiled()
            take_gaps()
        with (
            self.run.open_feed(start) as feed,
            self.times("train"),
            self.times.gauge("input wait", lambda: feed.waited),
        ):
            for at in range(start + 1, total + 1):
                self.profiler.before(at)
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
                if stopping or improved or saving:
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

    def make_up_for(self, restored: Restored) -> None:
        """What the attempt that ended in this checkpoint knew, and the evaluation that it owes.

        That one never counts as the best, for the checkpoint is already written without it.

        Raises:
          Interrupted: it was cut short again, and is still owed.
        """
        self.best = restored.metadata.get("best", {})
        if not restored.metadata["owes_evaluation"]:
            return
        with self.times("train"):
            found = self.evaluate(restored.step)
        if found is None:
            raise Interrupted(
                f"{self.stop.name}: step {restored.step} is saved in {self.workdir.path}, its"
                " evaluation is not done; the same command makes up for it"
            )

    def note_best(self, at: int, found: dict[str, float] | None) -> bool:
        """Notes an evaluation that is the best so far by `checkpoint.keep_best`, and says whether.

        Raises:
          UserError: no evaluation gives that metric; the state is saved.
        """
        name = self.run.config.checkpoint.keep_best
        if self.best_metric is None or not found:
            return False
        if name not in found:
            self.save(at, None, owes_evaluation=False)
            self.store.wait()
            raise UserError(
                f"config.checkpoint.keep_best={name!r} is no metric; {nearest(name, found)}"
            )
        if not self.best_metric.is_better(found[name], self.best.get(name)):
            return False
        self.best = {name: found[name]}
        return True

    def evaluate(self, at: int) -> dict[str, float] | None:
        """Metrics of the current state on every split; None where a signal cut it short.

        With an average of the parameters, `NAME_ema/...` are its metrics.
        """
        self.log.flush()
        # Only a process that is alone may leave early: the others would wait for it.
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
        self.log.write(at, {f"eval/{name}": value for name, value in found.items()})
        headline = tracking.headline(self.run.task.headline, found)
        if headline:
            self.log.message(f"step {at}: {headline} {found[headline]:.4f}")
        self.results = found
        return found

    def params(self) -> Params:
        """The parameters to evaluate: those of the last step, as the optimizer wants them read."""
        return self.run.optimizer.evaluation_params(self.state.params, self.state.opt_state)

    def published_params(self) -> Params:
        """What others should use: the average where there is one."""
        return self.params() if self.state.ema is None else self.state.ema

    def save(self, at: int, metrics: dict[str, float] | None, *, owes_evaluation: bool) -> None:
        """Starts a checkpoint of the current state, which must be a good one."""
        self.log.flush()
        losses = self.state.losses
        bad_steps, spikes = jax.device_get((self.state.bad_steps, losses.in_a_row if losses else 0))
        self.log.check(at, int(bad_steps), int(spikes))
        with self.log.paused(), self.times("save"):
            self.log.sync()
            metadata = {
                "seconds": self.times.so_far(),
                "owes_evaluation": owes_evaluation,
                "best": self.best,
            }
            self.store.save(at, self.state, metadata, metrics)


def check_keep_best(config: ConfigDict, evaluator: Evaluator) -> None:
    """Raises `UserError` where `checkpoint.keep_best` is of no split, before a step is trained.

    Which metrics a split has is known only when it has been evaluated.
    """
    name = config.checkpoint.keep_best
    endings = ("", "_ema") if config.ema_decay else ("",)
    known = [f"{split.name}{ending}" for split in evaluator.splits for ending in endings]
    if name and not name.startswith(tuple(f"{split}/" for split in known)):
        raise UserError(
            f"config.checkpoint.keep_best={name!r}: write SPLIT/METRIC, where SPLIT is"
            f" {' or '.join(known) or 'one of config.eval.sets, which is empty'}"
        )


def open_log(run: Run, workdir: Workdir, start_step: int, times: Stopwatch) -> StepLog:
    """The run's rows and console; silent in all processes but the first."""
    return StepLog(
        workdir.path,
        start_step=start_step,
        total=run.duration.total,
        every=run.duration(run.config.log.every, "log.every"),
        batch_size=run.config.batch_size,
        max_skipped_steps=run.config.max_skipped_steps,
        max_spikes=run.config.spikes.max_skipped,
        is_writer=jax.process_index() == 0,
        writers=writer_names(run.config.log),
        config=run.config.to_dict(),
        additions=Monitor(run, times).row,
    )


def restore_or_init(
    run: Run, store: Store
) -> tuple[step.State, Restored | None, MergeReport | None]:
    """The newest whole checkpoint, or the first state where there is none.

    With the first state comes what was made of `config.init.checkpoint`, if it names one.

    What the newest checkpoint lacks because the config has changed (a new optimizer stage, an
    average that was off) starts fresh.

    Raises:
      UserError: checkpoints are damaged beyond going back, or lack parameters of the model.
    """
    restored = store.restore_newest(run.abstract)
    if restored is None:
        state, merged = initial_state.first_state(run)
        return state, None, merged
    restored.check_whole("params")
    state = restored.tree
    if restored.missing:
        fresh = run.make_state()
        if state.ema is None or any(name.startswith("ema.") for name in restored.missing):
            fresh = fresh.replace(ema=fresh.ema and _copies(state.params, fresh.ema))
        state = jax.tree.map(
            lambda old, new: new if old is None else old, state, fresh, is_leaf=lambda x: x is None
        )
    return state, restored, None


def _copies(params: Params, like: Params) -> Params:
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.tree.map(jnp.copy, sharding.moved(params, places))


def lost_seconds(workdir: Workdir, restored: Restored) -> float:
    """What an earlier attempt spent on steps that have to be done again.

    Known as far as its log goes, which on object stores ends at the checkpoint.
    """
    reached = max(
        (row.get("train/run_seconds", 0.0) for row in read_metrics(workdir.path)), default=0
    )
    return max(0.0, reached - total_seconds(restored.metadata["seconds"]))


def last_evaluation(workdir: Workdir) -> dict[str, float]:
    """The last evaluation in the run's log."""
    results: dict[str, float] = {}
    for row in read_metrics(workdir.path):
        found = {name[5:]: value for name, value in row.items() if name.startswith("eval/")}
        results = found or results
    return results


def advice(store: Store) -> str:
    """What to do about a run that diverged."""
    store.wait()
    last = f"the last checkpoint is step {store.steps()[-1]}" if store.steps() else "no checkpoint"
    return (
        f"{last} in {store.directory}. Try a lower optim.lr, a longer optim.schedule.warmup,"
        " optim.clip_norm=1, or tolerate single ones with --config.max_skipped_steps=5"
    )


def is_due(at: int, every: int, total: int) -> bool:
    """Whether something that happens every so many steps (0: only at the end) happens now."""
    return at == total or (every > 0 and at % every == 0)


def opening_lines(
    run: Run, restored: Restored | None, changed: list[str], merged: MergeReport | None
) -> Iterator[str]:
    """What a person should know before the first step."""
    axes = [f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1]
    devices = f"{run.mesh.size} {run.mesh.devices.flat[0].platform} device(s)"
    yield (
        f"{run.config.model.name}: {run.num_params():,} parameters,"
        f" {len(run.source):,} training examples, {run.duration.total:,} steps of"
        f" {run.config.batch_size} on {', '.join([devices, *axes])}"
    )
    if merged:
        yield from str(merged).splitlines()
    if restored:
        yield from (f"warning: damaged checkpoint: {line}" for line in restored.damaged)
        yield from (f"warning: changed since the checkpoint: {line}" for line in changed)
        fresh = [name for name in restored.missing if not name.startswith("ema.")]
        if fresh:
            yield f"warning: not in the checkpoint, started fresh: {len(fresh)} arrays ({fresh[0]})"
        yield f"resuming after step {restored.step}"
