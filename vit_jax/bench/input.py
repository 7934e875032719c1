"""Measures the input pipeline alone, and in turns with others."""

import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vit_jax.bench.rivals import Rival
from vit_jax.data import Source
from vit_jax.errors import UserError
from vit_jax.training.run import host_batches, open_source

NUM_IMAGES = 512
"""Images that rivals read, over and over."""


def on_photographs(config: ConfigDict) -> ConfigDict:
    """Returns a config with the same preprocessing on encoded photographs, in batches of 128."""
    changed = ConfigDict(config.to_dict(), type_safe=False)
    changed.batch_size = 128
    changed.data.source, changed.data.name, changed.data.split = "fake", "fake", "train"
    changed.data.args = {"encoded": True}
    changed.data.repeats = 1
    return changed


def bench_input(config: ConfigDict, batches: int = 50) -> dict[str, float]:
    """Measures the input pipeline alone: host memory to host memory, without a device."""
    with host_batches(config, open_source(config.data), start_step=0) as stream:
        for _ in range(3):  # The first batches fill buffers.
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
    """Measures our input pipeline and another in turns, on the same images, each with all cores.

    Args:
      rival: `timm` is timm's loader with the same crop, flip and RandAugment, which decodes whole
        images with Pillow. `tfrecord` is tf.data on a file that is read sequentially, with our
        preprocessing. Both read the first `NUM_IMAGES` images of our source repeatedly.

    Returns:
      Rates in images per second; the ratio is the median over the rounds of our rate over theirs.

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
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        _write_files(source, folder)
        other = Rival.of_input(rival, str(folder), config.data.pp, config.batch_size)
        with contextlib.closing(other):
            for _ in range(rounds):
                ours.append(bench_input(config, batches)["images_per_sec"])
                theirs.append(images / other.seconds(batches))
    return {
        "images_per_sec_per_core": statistics.median(ours) / cores,
        f"{rival}_images_per_sec_per_core": statistics.median(theirs) / cores,
        f"{rival}_ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def _write_files(source: Source, folder: Path) -> None:
    """Writes the first encoded images of a source as files, named in their order."""
    folder.mkdir()
    for index in range(min(NUM_IMAGES, len(source))):
        encoded = source.fetch(np.array([index]))["image"][0]
        (folder / f"{index:06}").write_bytes(encoded)
