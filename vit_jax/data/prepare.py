"""Finding, preparing, converting, copying and checking TFDS datasets, ours included."""

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from vit_jax.data import builders, host_tensorflow, imagenet_tars, shards  # noqa: F401  TFDS must not find accelerators.
from vit_jax.data.shards import Tell
from vit_jax.data.tfrecord import TfrecordReader
from vit_jax.errors import UserError, nearest

_INFO = "dataset_info.json"

FILE_FORMAT = "array_record"
"""The format of TFDS that can be read at random."""


def find_builder(name: str, data_dir: str = "", *, file_format: str | None = None):
    """The TFDS builder of `name` (`NAME`, `NAME/CONFIG`, with `:VERSION` if need be).

    Args:
        name: one of ours (`vit_jax/data/builders`), one of TFDS, or one that is only on disk.
        data_dir: where prepared datasets are; empty for TFDS's own default.
        file_format: of a dataset yet to be prepared; None for whichever is on disk.
    """
    import tensorflow_datasets as tfds

    short = name.partition(":")[0].partition("/")[0]
    if short in _own_builders():
        importlib.import_module(f"{builders.__name__}.{short}")  # Registers it with TFDS.
    try:
        kwargs = {"file_format": file_format} if file_format else {}
        return tfds.builder(name, data_dir=data_dir or None, try_gcs=False, **kwargs)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = [*_own_builders(), *tfds.list_builders(with_community_datasets=False)]
        raise UserError(f"TFDS has no dataset {name!r}; {nearest(short, known)}") from error
    except (ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"TFDS cannot open the dataset {name!r}: {reason}") from error


def is_prepared(builder) -> bool:
    """Whether the files of a builder's dataset are there, whole."""
    return (builder.data_path / _INFO).exists()


def prepare(name: str, data_dir: str = "", manual_dir: str = "", tell: Tell = print) -> str:
    """Downloads and writes a dataset for random access; returns the folder it is in.

    Atomic: a dataset is written under another name and renamed at the end, so an interrupted
    preparation leaves nothing that could be taken for one. Does nothing if it is there. ImageNet,
    which cannot be downloaded, is built from archives in `manual_dir` (see `imagenet_tars`).
    """
    import tensorflow_datasets as tfds

    _check_local(data_dir)
    builder = find_builder(name, data_dir, file_format=FILE_FORMAT)
    if is_prepared(builder):
        return str(builder.data_path)
    if builder.name == imagenet_tars.NAME:
        default = Path(builder.data_path).parents[1] / "downloads" / "manual"
        imagenet_tars.build(builder, Path(manual_dir).expanduser() if manual_dir else default, tell)
        return str(builder.data_path)
    keys = {"manual_dir": manual_dir} if manual_dir else {}
    try:
        builder.download_and_prepare(
            file_format=FILE_FORMAT, download_config=tfds.download.DownloadConfig(**keys)
        )
    except AssertionError as error:
        # How TFDS says that files must be fetched by hand, with where to put them.
        raise UserError(" ".join(str(error).split())) from error
    except (OSError, tfds.download.DownloadError) as error:
        raise UserError(f"dataset {name!r} could not be prepared: {error}") from error
    return str(builder.data_path)


def convert_tfrecord(name: str, source_dir: str, data_dir: str, tell: Tell = print) -> str:
    """Writes the TFRecord build of a dataset in `source_dir` for random access into `data_dir`.

    Record by record, undecoded, in the same order and as many files; goes on where it was
    interrupted. Returns the folder.
    """
    import tensorflow_datasets as tfds

    if not data_dir:
        raise UserError("prepare: --tfrecord needs --data_dir=DIR, another folder to write to")
    _check_local(data_dir)
    source = find_builder(name, source_dir)
    if not is_prepared(source):
        raise UserError(f"prepare: --tfrecord={source_dir} holds no dataset {name!r}")
    if source.info.file_format is not tfds.core.file_adapters.FileFormat.TFRECORD:
        raise UserError(f"{source.data_path} is {source.info.file_format.value}, not TFRecord")
    target = find_builder(name, data_dir, file_format=FILE_FORMAT)
    if is_prepared(target):
        return str(target.data_path)
    folder = shards.building_folder(target)
    lengths = {}
    for split, info in source.info.splits.items():
        reader = TfrecordReader(info.file_instructions, bytes, remote="://" in source_dir)
        counts = info.shard_lengths
        ends = np.cumsum(counts).tolist()
        parts = [
            shards.Part(
                shards.file_name(target.name, split, number, len(counts)),
                count,
                functools.partial(_in_turn, reader, range(end - count, end)),
            )
            for number, (count, end) in enumerate(zip(counts, ends, strict=True))
        ]
        shards.write(parts, folder, lambda line, split=split: tell(f"{split}: {line}"))
        lengths[split] = counts
    shards.finish(target, lengths, folder)
    return str(target.data_path)


def _in_turn(reader: TfrecordReader, rows: range) -> Iterator[bytes]:
    for row in rows:
        yield from reader.__getitems__([row])


def _check_local(data_dir: str) -> None:
    if "://" in data_dir:
        raise UserError(
            f"prepare: --data_dir={data_dir}: datasets are written to a local disk; prepare there,"
            " then --copy_to=gs://... brings the dataset to a bucket"
        )


def copy(name: str, data_dir: str, destination: str, tell: Tell = print) -> str:
    """Copies a prepared dataset to another data_dir, such as `gs://bucket/tfds`.

    Files that are there with the right size are not copied again; `dataset_info.json`, which makes
    a dataset of them, goes last. Returns the folder.
    """
    builder = find_builder(name, data_dir)
    _require_prepared(builder, name)
    source = epath.Path(builder.data_path)
    target = epath.Path(destination) / builder.info.full_name
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(source.iterdir(), key=lambda path: (path.name == _INFO, path.name))
    for number, path in enumerate(files, 1):
        there = target / path.name
        if there.exists() and there.stat().length == path.stat().length:
            continue
        path.copy(there, overwrite=True)
        tell(f"{number} of {len(files)} files: {there}")
    return str(target)


def check(name: str, data_dir: str, tell: Tell = print) -> str:
    """Counts the records of every file and compares checksums where the build noted some.

    Raises:
      UserError: the first file that is missing, short or changed; for ImageNet, other counts than
        the published ones.
    """
    builder = find_builder(name, data_dir)
    _require_prepared(builder, name)
    sums = shards.read_checksums(builder.data_path)
    for split, info in builder.info.splits.items():
        for instruction in info.file_instructions:
            _check_file(instruction, sums)
        tell(f"{split}: {info.num_examples} records in {len(info.shard_lengths)} files")
        expected = imagenet_tars.COUNTS.get(split) if builder.name == imagenet_tars.NAME else None
        if expected not in (None, info.num_examples):
            raise UserError(
                f"{builder.data_path}: split {split!r} has {info.num_examples} images; ImageNet"
                f" has {expected}"
            )
    tell("checksums agree" if sums else "no checksums were noted when this was written")
    return str(builder.data_path)


def _check_file(instruction: Any, sums: Mapping[str, Mapping[str, Any]]) -> None:
    path = epath.Path(instruction.filename)
    if not path.exists():
        raise UserError(f"{path} is missing; prepare or copy the dataset again")
    noted = sums.get(path.name)
    if noted and shards.checksum(path) != noted:
        raise UserError(f"{path} has changed since it was written; prepare or copy it again")
    if ".array_record" in path.name and "://" not in str(path):
        from array_record.python import array_record_module

        found = array_record_module.ArrayRecordReader(str(path)).num_records()
        if found != instruction.examples_in_shard:
            raise UserError(f"{path} has {found} of {instruction.examples_in_shard} records")


def _require_prepared(builder, name: str) -> None:
    if not is_prepared(builder):
        raise UserError(f"dataset {name!r} is not in {builder.data_path}; prepare it first")


def _own_builders() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(builders.__path__)]
