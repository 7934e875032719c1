"""Measures the input pipeline alone, and in turns with others."""

import contextlib
import dataclasses
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vit_jax.bench.rivals import STORED_ONLY, Rival
from vit_jax.data import Source
from vit_jax.data.stored import Form, compare
from vit_jax.errors import UserError
from vit_jax.training.run import host_batches, open_source

NUM_IMAGES = 512
"""Images that rivals read, over and over."""

_COMPARED = 64
"""The images whose crops are compared between original and stored files."""


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
    config: ConfigDict, rival: str, form: Form | None = None, batches: int = 20, rounds: int = 3
) -> dict[str, float]:
    """Measures our input pipeline and another in turns, on the same images, each with all cores.

    Args:
      rival: `timm` is timm's loader with the same crop, flip and RandAugment, which decodes whole
        images with Pillow. `tfrecord` is tf.data on a file that is read sequentially, with our
        preprocessing. `grain` is Grain's loader with Pillow's crop and flip. `ffcv` is FFCV's
        loader on its own file. All read the first `NUM_IMAGES` images of our source repeatedly.
      form: the form of images in which `prepare --store` writes a second version of a dataset.
        Both loaders are then measured on that version, too, and FFCV on that version alone.

    Returns:
      Rates in images per second. A ratio is the median over the rounds of our rate over theirs:
      `{rival}_ratio` on the original files, `{rival}_ratio_stored` on the stored files of both, and
      `{rival}_ratio_ours_stored` of ours on stored over theirs on original files. The names of what
      was measured on stored files end in `_stored`; `stored_...` compares the images themselves.

    Raises:
      UserError: images are not encoded, the rival is not installed, or it lacks the preprocessing;
        or there is no stored version of the dataset.
    """
    configs = {"": config} if rival not in STORED_ONLY else {}
    if form:
        configs["_stored"] = stored_config(config, form)
    elif not configs:
        raise UserError(
            f"bench --against={rival}: it encodes images anew, so compare it on stored images, with"
            " --stored=q90,max_side=512"
        )
    cores, images = len(os.sched_getaffinity(0)), batches * config.batch_size
    ours: dict[str, list[float]] = {end: [] for end in configs}
    theirs: dict[str, list[float]] = {end: [] for end in configs}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as rivals:
        others = {}
        for end, one in configs.items():
            folder = Path(scratch) / f"images{end}"
            _write_files(_encoded_source(one, rival), folder)
            other = Rival.of_input(rival, str(folder), one.data.pp, one.batch_size)
            others[end] = rivals.enter_context(contextlib.closing(other))
        difference = _difference(Path(scratch)) if len(configs) > 1 else {}
        for _ in range(rounds):
            for end, one in configs.items():
                ours[end].append(bench_input(one, batches)["images_per_sec"])
                theirs[end].append(images / others[end].seconds(batches))
    found = {}
    for end in configs:
        found[f"images_per_sec_per_core{end}"] = statistics.median(ours[end]) / cores
        found[f"{rival}_images_per_sec_per_core{end}"] = statistics.median(theirs[end]) / cores
        found[f"{rival}_ratio{end}"] = _ratio(ours[end], theirs[end])
    if len(configs) > 1:
        found[f"{rival}_ratio_ours_stored"] = _ratio(ours["_stored"], theirs[""])
    return {**found, **difference}


def stored_config(config: ConfigDict, form: Form) -> ConfigDict:
    """Returns a config that reads the version of its dataset that `prepare --store` writes.

    Raises:
      UserError: the source has no such version.
    """
    changed = ConfigDict(config.to_dict(), type_safe=False)
    if config.data.source == "fake":
        side = f",max_side={form.max_side}" if form.max_side else ""
        changed.data.args = {**config.data.args, "stored": f"q{form.quality}{side}"}
    elif config.data.source == "tfds":
        changed.data.name = re.sub(r"^[^/:]*", rf"\g<0>{form.suffix}", config.data.name)
    else:
        raise UserError(
            f"bench --stored: the source {config.data.source!r} has no stored version; tfds and"
            " fake do"
        )
    return changed


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _difference(scratch: Path) -> dict[str, float]:
    """Compares the original files with the stored ones."""
    names = sorted(path.name for path in (scratch / "images").iterdir())[:_COMPARED]
    before, after = (
        [(scratch / folder / name).read_bytes() for name in names]
        for folder in ("images", "images_stored")
    )
    found = dataclasses.asdict(compare(before, after))
    return {f"stored_{name}": value for name, value in found.items()}


def _encoded_source(config: ConfigDict, rival: str) -> Source:
    source = open_source(config.data)
    if source.fetch(np.array([0]))["image"].dtype != object:
        raise UserError(
            f"bench --against={rival} needs encoded images, such as"
            " --config.data.source=fake --config.data.args.encoded=true"
        )
    return source


def _write_files(source: Source, folder: Path) -> None:
    """Writes the first encoded images of a source as files, named in their order."""
    folder.mkdir()
    for index in range(min(NUM_IMAGES, len(source))):
        encoded = source.fetch(np.array([index]))["image"][0]
        (folder / f"{index:06}").write_bytes(encoded)
