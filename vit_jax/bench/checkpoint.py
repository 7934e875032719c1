"""Measures checkpoints: the delay of training by a save, and the speed of saves and restores."""

import itertools
import statistics
import tempfile
import time

import jax
from ml_collections import ConfigDict

from vit_jax.checkpoints.store import Store
from vit_jax.parallel.host_memory import tidy_heap
from vit_jax.training.run import Run

METADATA = {"seconds": {}, "owes_evaluation": False}


def bench_checkpoint(config: ConfigDict, saves: int = 5, steps: int = 10) -> dict[str, float]:
    """Measures steps with and without a save in the background, in turns; then a restore.

    `stall_seconds` is the time until the arrays have left the devices, in which no step starts.
    `save_cost_seconds` adds the extra time of the steps until the files are written, which is
    checked at the end of each step.
    `save_fraction_of_training` is that cost over the time of training between two saves at the
    config's cadence.
    """
    run = Run.build(config)
    train_step = run.compile_step()
    state = run.make_state()
    tidy_heap()
    bare, stalls, costs, written = [], [], [], []
    with run.open_feed(0) as feed, tempfile.TemporaryDirectory() as folder:
        batch = feed.next_batch()
        store = Store(folder, keep_last=1)
        for number in range(saves + 1):
            started = time.perf_counter()
            for _ in range(steps):
                state, _ = train_step(state, batch)
            jax.block_until_ready(state)
            step_seconds = (time.perf_counter() - started) / steps

            started = time.perf_counter()
            store.save(number, state, METADATA)
            stalled = time.perf_counter() - started
            for done in itertools.count(1):  # noqa: B007 (used after the loop)
                state, _ = train_step(state, batch)
                jax.block_until_ready(state)
                if not store.is_busy():
                    break
            elapsed = time.perf_counter() - started
            if number:  # The first turn compiles the checksums and fills caches.
                bare.append(step_seconds)
                stalls.append(stalled)
                costs.append(elapsed - done * step_seconds)
                written.append(elapsed)
        store.close()
        restore_seconds = _restore_seconds(folder, run)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract))
    every = run.duration(config.checkpoint.every, "checkpoint.every") or run.duration.total
    step_seconds, cost = statistics.median(bare), statistics.median(costs)
    return {
        "step_seconds": step_seconds,
        "stall_seconds": statistics.median(stalls),
        "save_cost_seconds": cost,
        "save_fraction_of_training": cost / (every * step_seconds),
        "steps_between_saves": every,
        "state_mb": size / 1e6,
        "save_mb_per_sec": size / 1e6 / statistics.median(written),
        "restore_mb_per_sec": size / 1e6 / restore_seconds,
        "num_devices": run.mesh.size,
    }


def _restore_seconds(folder: str, run: Run, rounds: int = 3) -> float:
    """Returns the seconds of a restore from the disk's cache, all checksums verified."""
    store = Store(folder)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(store.restore(store.newest(), run.abstract).tree)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
