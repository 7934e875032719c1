"""Writes a second version of a prepared dataset, whose images are encoded anew and smaller."""

import collections
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.prefetch import default_threads
from vit_jax.data.prepare import datasets, shards
from vit_jax.data.stored import Difference, Form, compare
from vit_jax.data.tfrecord import checked_records
from vit_jax.errors import UserError

REPORT = "stored.json"
"""The file in a stored dataset with its form, its source, and how it differs."""

_INFO = "dataset_info.json"
_COMPARED = 256
_READ_AT_ONCE = 64


def store(name: str, data_dir: str, form: Form, tell: shards.Tell = print) -> str:
    """Writes the dataset `name` in another form, as a dataset of its own; returns its folder.

    `imagenet2012` becomes `imagenet2012_q90_512`, beside it, with the same version, splits, order
    and features. Each split is written in as many files as it had. An interrupted call is resumed
    by the next, and a finished dataset is left unchanged.

    Raises:
      UserError: the dataset is not prepared, has no images to encode, or one is damaged; or it has
        masks, whose size would no longer be that of their images.
    """
    source = datasets.find_builder(name, data_dir)
    datasets.require_prepared(source, name)
    datasets.check_local(str(source.data_path))
    keys = _image_keys(source.info.features, form)
    parts = source.info.full_name.split("/")
    root = Path(source.data_path).parents[len(parts) - 1]
    target = root.joinpath(f"{parts[0]}{form.suffix}", *parts[1:])
    if not (target / _INFO).exists():
        _write(source, target, keys, form, tell)
    tell(str(_reported(target) or _compared(source, target, keys[0])))
    return str(target)


def _reported(target: Path) -> Difference | None:
    """Returns how a stored dataset differs from its source; None if that cannot be read."""
    try:
        return Difference(**json.loads((target / REPORT).read_text())["difference"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(source: Any, target: Path, keys: Sequence[str], form: Form, tell: shards.Tell) -> None:
    folder = target.with_name(f"{target.name}.building")
    dataset = target.relative_to(target.parents[len(source.info.full_name.split("/")) - 1]).parts[0]
    lengths = {}
    for split, info in source.info.splits.items():
        counts = info.shard_lengths
        todo = [
            shards.Part(
                shards.file_name(dataset, split, number, len(counts)),
                count,
                functools.partial(_encoded_anew, str(path), keys, form),
                shards.origin_of(path),
            )
            for number, (count, path) in enumerate(zip(counts, info.filepaths, strict=True))
        ]
        shards.write(todo, folder, shards.telling_of(split, tell))
        lengths[split] = counts
    _describe(source, folder, dataset, lengths, form)
    report = {"source": source.info.full_name, **form._asdict()}
    report["difference"] = dataclasses.asdict(_compared(source, folder, keys[0]))
    (folder / REPORT).write_text(json.dumps(report, indent=1))
    folder.rename(target)


def _compared(source: Any, folder: Path, key: str) -> Difference:
    """Compares the stored images of the first split with their originals."""
    dataset = json.loads((folder / _INFO).read_text())["name"]
    return _difference(source, folder, dataset, next(iter(source.info.splits)), key)


def _image_keys(features: Any, form: Form) -> list[str]:
    """Returns the names of the photographs of an example."""
    import tensorflow_datasets as tfds

    encoded = {
        key: feature
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    masks = [
        key
        for key, feature in encoded.items()
        if feature.shape[-1] != 3 or isinstance(feature, tfds.features.LabeledImage)
    ]
    keys = [key for key in encoded if key not in masks]
    if not keys:
        raise UserError("prepare: --store needs a dataset with encoded images of three channels")
    if masks and form.max_side:
        raise UserError(
            f"prepare: --store: max_side does not go with the masks {', '.join(masks)}, which keep"
            f" their size; write --store=q{form.quality}"
        )
    return keys


def _records(path: str) -> Iterator[bytes]:
    """Yields the serialized examples of a file of a dataset."""
    if ".tfrecord" in os.path.basename(path):
        yield from checked_records(path)
        return
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(path)
    count = reader.num_records()
    for start in range(0, count, _READ_AT_ONCE):
        yield from reader.read(list(range(start, min(start + _READ_AT_ONCE, count))))


def _encoded_anew(path: str, keys: Sequence[str], form: Form) -> Iterator[bytes]:
    """Yields the examples of a file with their images in another form."""

    def anew(numbered: tuple[int, bytes]) -> bytes:
        number, record = numbered
        example = tf.train.Example.FromString(record)
        for key in keys:
            values = example.features.feature[key].bytes_list.value
            try:
                values[:] = [form.encode(value) for value in values]
            except OSError as error:
                raise UserError(f"record {number} of {path}: {key}: {error}") from error
        return example.SerializeToString()

    return _in_threads(anew, enumerate(_records(path)))


def _in_threads(function: Callable[[Any], bytes], values: Iterable) -> Iterator[bytes]:
    """Yields `function(value)` of all values in their order, computed by a thread for each core."""
    cores = default_threads()
    pending: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(cores) as threads:
        for value in values:
            pending.append(threads.submit(function, value))
            if len(pending) > 4 * cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _describe(
    source: Any, folder: Path, dataset: str, lengths: dict[str, Sequence[int]], form: Form
) -> None:
    """Writes the files that make a folder of shards a dataset of TFDS."""
    old = Path(source.data_path)
    names = [f"{source.info.name}-{split}." for split in lengths]
    for path in old.iterdir():
        is_shard = any(path.name.startswith(name) for name in names)
        if path.is_file() and not is_shard and path.name not in (_INFO, shards.CHECKSUMS, REPORT):
            shutil.copyfile(path, folder / path.name)
    info, sums = json.loads((old / _INFO).read_text()), shards.read_checksums(folder)
    size = f", sides of at most {form.max_side} pixels" if form.max_side else ""
    info["description"] = (
        f"{source.info.full_name}, its images encoded anew as JPEG of quality {form.quality}{size}."
        f"\n\n{info.get('description', '')}"
    )
    info |= {"name": dataset, "fileFormat": datasets.FILE_FORMAT}
    info["splits"] = [
        {
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "shardLengths": [str(count) for count in counts],
            "numBytes": str(
                sum(
                    sums[shards.file_name(dataset, split, number, len(counts))]["size"]
                    for number in range(len(counts))
                )
            ),
        }
        for split, counts in lengths.items()
    ]
    (folder / _INFO).write_text(json.dumps(info, indent=2))


def _difference(source: Any, folder: Path, dataset: str, split: str, key: str) -> Difference:
    """Compares examples from all over a split with what is stored of them."""
    info = source.info.splits[split]
    files, counts = info.filepaths, info.shard_lengths
    numbers = np.unique(np.linspace(0, len(files) - 1, min(len(files), 8)).astype(int)).tolist()
    pairs: list[tuple[bytes, bytes]] = []
    for number in numbers:
        new = folder / shards.file_name(dataset, split, number, len(counts))
        wanted = -(-_COMPARED // len(numbers))
        for both in zip(_records(str(files[number])), _records(str(new)), strict=True):
            if wanted == 0:
                break
            pairs.append((_image_of(both[0], key), _image_of(both[1], key)))
            wanted -= 1
    return compare([before for before, _ in pairs], [after for _, after in pairs])


def _image_of(record: bytes, key: str) -> bytes:
    return tf.train.Example.FromString(record).features.feature[key].bytes_list.value[0]
