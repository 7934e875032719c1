"""The checkpoints and the log that a run opens, and the lines that it prints first."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax.checkpoints import MergeReport, hub
from vit_jax.checkpoints.store import Restored, Store
from vit_jax.tracking.log import writer_names
from vit_jax.tracking.step_log import StepLog, Stopwatch
from vit_jax.tracking.utilization import Monitor
from vit_jax.training.best import Best
from vit_jax.training.run import Run
from vit_jax.training.stages import Stages
from vit_jax.training.workdir import Workdir


def open_store(config: ConfigDict, workdir: Workdir, best: Best) -> Store:
    """Returns the checkpoints of the workdir, kept and retried as `config.checkpoint` says."""
    return Store(
        workdir.checkpoints,
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        least_is_best=best.metric is not None and not best.metric.higher_is_better,
        retries=config.checkpoint.retries,
    )


def record_start(workdir: Workdir, run: Run, best: Best, command: Sequence[str]) -> None:
    """Records in the workdir that the run is going on, and what is needed to repeat it."""
    workdir.mark_done(False)
    workdir.write_config(
        run.config,
        run.task.info,
        run.task.headline,
        best.metric_info,
        num_examples=len(run.source),
        command=command,
        devices=run.mesh.devices,
    )


def open_log(
    stages: Stages, workdir: Workdir, start_step: int, times: Stopwatch, callbacks: Sequence[Any]
) -> StepLog:
    """Returns the log of rows and the console, which only process 0 writes."""
    run = stages.run
    device_kind = run.mesh.devices.flat[0].device_kind
    monitor = Monitor(device_kind, run.mesh.size, stages.train_flops_per_example, times)
    return StepLog(
        workdir.path,
        start_step=start_step,
        total=run.duration.total,
        every=run.duration(run.config.log.every, "log.every"),
        batch_size=run.config.batch_size,
        max_skipped_steps=run.config.max_skipped_steps,
        max_spikes=run.config.spikes.max_skipped,
        writers=writer_names(run.config.log),
        config=run.config.to_dict(),
        is_writer=jax.process_index() == 0,
        additions=monitor.row,
        warnings=run.task.warnings,
        callbacks=callbacks,
    )


def opening_lines(
    run: Run,
    restored: Restored | None,
    merged: MergeReport | None,
    changed: Sequence[str],
) -> Iterator[str]:
    """Yields what a person should know before the first step.

    Args:
      restored: the checkpoint that the run resumes from, if any.
      merged: the account of the checkpoint that the run starts from, if any.
      changed: the differences from the run that is resumed, one line each.
    """
    axes = [f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1]
    devices = f"{run.mesh.size} {run.mesh.devices.flat[0].platform} device(s)"
    yield (
        f"{run.config.model.name}: {run.num_params():,} parameters,"
        f" {len(run.source):,} training examples, {run.duration.total:,} steps of"
        f" {run.config.batch_size} on {', '.join([devices, *axes])}"
    )
    if merged:
        yield from str(merged).splitlines()
        for address, commit in hub.commits_in(run.config.init.checkpoint).items():
            yield f"{address}: commit {commit}"
    if restored:
        yield from (f"warning: damaged checkpoint: {line}" for line in restored.damaged)
        yield from (f"warning: changed since the checkpoint: {line}" for line in changed)
        fresh = [name for name in restored.missing if not name.startswith("ema.")]
        if fresh:
            yield f"warning: not in the checkpoint, started fresh: {len(fresh)} arrays ({fresh[0]})"
        for rule in restored.restarted:
            yield (
                f"warning: all moments of {rule} start anew: it counts its updates for all"
                " parameters together, and some are new to it (optim.freeze_until gives parameters"
                " a count of their own)"
            )
        yield f"resuming after step {restored.step}"
