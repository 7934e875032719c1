"""The input pipeline alone, and in turns with others."""

import os
import statistics
import time

import numpy as np
from ml_collections import ConfigDict

from vit_jax.bench import timm_loader
from vit_jax.data import sequential
from vit_jax.errors import UserError
from vit_jax.training.run import host_batches, open_source

RIVALS = {"timm": timm_loader.seconds_for, "tfrecord": sequential.seconds_for}
"""What `bench input --against` runs in turns with our pipeline."""


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
