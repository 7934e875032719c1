"""Measures the training step of a config: alone, and in the training loop."""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict

from vit_jax.bench.machine import matmul_rate
from vit_jax.parallel.host_memory import tidy_heap
from vit_jax.tracking.log import writer_names
from vit_jax.tracking.step_log import StepLog
from vit_jax.training import step
from vit_jax.training.run import Run
from vit_jax.types import Array


def bench_step(config: ConfigDict, steps: int = 20, rounds: int = 5) -> dict[str, float]:
    """Measures the compiled step alone, and inside the loop with input, logging and guards.

    The two run in turns of `steps` steps. `loop_overhead`, the cost of everything around the step,
    is the median time of the loop relative to that of the bare step, minus one.
    """
    run = Run.build(config)
    state = run.make_state()
    started = time.perf_counter()
    train_step = run.compile_step()
    compile_seconds = time.perf_counter() - started
    tidy_heap()

    bare_seconds, loop_seconds = [], []
    with run.open_feed(0) as feed, tempfile.TemporaryDirectory() as folder:
        batch = feed.next_batch()
        state, _ = train_step(state, batch)
        jax.block_until_ready(state)
        numbers = itertools.count(1)
        with _quiet_log(run, folder) as log:
            for _ in range(rounds):
                bare, state = _timed(steps, train_step, state, lambda: batch)
                bare_seconds.append(bare / steps)

                def logged(
                    state: step.State, batch: dict[str, Array]
                ) -> tuple[step.State, dict[str, Array]]:
                    with jax.transfer_guard("disallow"):
                        state, metrics = train_step(state, batch)
                    log.step(next(numbers), metrics, feed.waited)
                    return state, metrics

                loop, state = _timed(steps, logged, state, feed.next_batch)
                loop_seconds.append(loop / steps)
        waited = feed.waited
    bare, loop = statistics.median(bare_seconds), statistics.median(loop_seconds)
    return {
        "images_per_sec": config.batch_size / bare,
        "step_seconds": bare,
        "compile_seconds": compile_seconds,
        "loop_step_seconds": loop,
        "loop_overhead": statistics.median(
            looped / alone - 1 for looped, alone in zip(loop_seconds, bare_seconds, strict=True)
        ),
        "input_wait_fraction": waited / sum(seconds * steps for seconds in loop_seconds),
        "matmul_gflops_per_sec": matmul_rate() / 1e9,
        "num_devices": run.mesh.size,
        "num_params": run.num_params(),
    }


def _quiet_log(run: Run, folder: str) -> StepLog:
    """Opens the log of a real run, without its console."""
    log = StepLog(
        epath.Path(folder),
        start_step=0,
        total=sys.maxsize,
        every=run.duration(run.config.log.every, "log.every"),
        batch_size=run.config.batch_size,
        max_skipped_steps=sys.maxsize,
        is_writer=True,
        writers=writer_names(run.config.log),
        config=run.config.to_dict(),
    )
    log.mute()
    return log


def _timed(
    steps: int, advance: Callable, state: step.State, next_batch: Callable
) -> tuple[float, step.State]:
    started = time.perf_counter()
    for _ in range(steps):
        state, _ = advance(state, next_batch())
    jax.block_until_ready(state)
    return time.perf_counter() - started, state
