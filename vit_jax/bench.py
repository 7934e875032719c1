"""Measures this machine: the training step, the input pipeline, the start of a run.

Machines are noisy, so what is compared is measured in turns (A B A B ...) and reported as medians
and their ratio. Every benchmark returns a dictionary of plain numbers, units in the names.
"""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vit_jax import bench_timm, step
from vit_jax.bench_model import matmul_rate
from vit_jax.data import sequential
from vit_jax.errors import UserError
from vit_jax.run import Run, host_batches, open_source
from vit_jax.steplog import StepLog
from vit_jax.types import Array

IMPORTS = (
    "import jax, flax, optax, orbax.checkpoint, tensorflow, tensorflow_datasets, vit_jax.train"
)
"""What a training run on a TFDS dataset imports before it can do anything."""


def bench_step(config: ConfigDict, steps: int = 20, rounds: int = 5) -> dict[str, float]:
    """The compiled training step alone, and inside the loop with input, logging and its guards.

    The two are run in turns of `steps` steps. `loop_overhead` is the loop's median time over the
    bare step's, minus one: what everything around the step costs.
    """
    run = Run.build(config)
    state = run.make_state()
    started = time.perf_counter()
    train_step = run.compile_step()
    compile_seconds = time.perf_counter() - started

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

                def logged(state: step.State, batch: dict[str, Array]):
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
    """The log of a real run, without its console."""
    log = StepLog(
        epath.Path(folder),
        start_step=0,
        total=sys.maxsize,
        every=run.duration(run.config.log.every, "log.every"),
        batch_size=run.config.batch_size,
        max_skipped_steps=sys.maxsize,
        tensorboard=run.config.log.tensorboard,
        is_writer=True,
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


def on_photographs(config: ConfigDict) -> ConfigDict:
    """A config with its preprocessing on encoded photographs, in batches of 128."""
    changed = ConfigDict(config.to_dict(), type_safe=False)
    changed.batch_size = 128
    changed.data.source, changed.data.name, changed.data.split = "fake", "fake", "train"
    changed.data.args = {"encoded": True}
    changed.data.repeats = 1
    return changed


def bench_input(config: ConfigDict, batches: int = 50) -> dict[str, float]:
    """The input pipeline alone: host memory to host memory, without a device."""
    with host_batches(config, open_source(config.data), start_step=0) as stream:
        for _ in range(3):  # The first ones fill buffers.
            next(stream)
        cpu, started = time.process_time(), time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    images = batches * config.batch_size
    return {
        "images_per_sec": images / seconds,
        "images_per_sec_per_core": images / seconds / len(os.sched_getaffinity(0)),
        "images_per_cpu_sec": images / cpu_seconds,
    }


RIVALS = {"timm": bench_timm.seconds_for, "tfrecord": sequential.seconds_for}
"""What `bench input --against` runs in turns with our pipeline."""


def bench_against(
    config: ConfigDict, rival: str, batches: int = 20, rounds: int = 3
) -> dict[str, float]:
    """Our input pipeline and another in turns, on the same encoded images, with all cores each.

    timm: its loader with the same crop, flip and RandAugment, decoding whole images with PIL.
    tfrecord: tf.data reading a file from the front, with our preprocessing.
    The ratio is the median over the rounds of our rate over theirs.

    Raises:
      UserError: images are not encoded, timm is not installed, or it lacks the preprocessing.
    """
    source = open_source(config.data)
    if source.fetch(np.array([0]))["image"].dtype != object:
        raise UserError(
            f"bench --against={rival} needs encoded images, such as"
            " --config.data.source=fake --config.data.args.encoded=true"
        )
    cores = len(os.sched_getaffinity(0))
    images = batches * config.batch_size
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(bench_input(config, batches)["images_per_sec"])
        seconds = RIVALS[rival](source, config.data.pp, config.batch_size, batches, cores)
        theirs.append(images / seconds)
    return {
        "images_per_sec_per_core": statistics.median(ours) / cores,
        f"{rival}_images_per_sec_per_core": statistics.median(theirs) / cores,
        f"{rival}_ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def bench_start(
    config_spec: str, overrides: Mapping[str, str], rounds: int = 3
) -> dict[str, float]:
    """How long a second start of a run takes to its first step, against its imports alone.

    Both are whole processes, run in turns; one start before them fills the compilation cache.
    """
    _seconds_to_first_step(config_spec, overrides)
    imports, first_steps = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
        imports.append(time.perf_counter() - started)
        first_steps.append(_seconds_to_first_step(config_spec, overrides))
    return {
        "import_seconds": statistics.median(imports),
        "first_step_seconds": statistics.median(first_steps),
        "first_step_over_imports": statistics.median(
            step / alone for step, alone in zip(first_steps, imports, strict=True)
        ),
    }


def _seconds_to_first_step(config_spec: str, overrides: Mapping[str, str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vit_jax", "train", f"--config={config_spec}",
                f"--workdir={Path(folder) / 'run'}",
                *(f"--config.{key}={value}" for key, value in overrides.items()),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - started
                process.kill()
                process.communicate()
                return seconds
        process.wait()
        raise RuntimeError(f"the run ended before its first step: {''.join(said[-3:])}")


def describe_machine() -> dict[str, str | int]:
    """Where figures were measured."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "host_cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }
