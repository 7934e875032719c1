"""Functions that find, prepare, convert, copy, and check TFDS datasets."""

import functools
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from vit_jax.data.host_tensorflow import tf  # Before TFDS, which must not find accelerators.
from vit_jax.data.prepare import imagenet_tars, shards
from vit_jax.data.prepare.shards import Tell
from vit_jax.data.tfrecord import checked_records
from vit_jax.errors import UserError, first_line, nearest, quoted
from vit_jax.plugins import names_in

_INFO = "dataset_info.json"
_BUILDERS = "vit_jax.data.builders"

FILE_FORMAT = "array_record"
"""The file format of TFDS that supports random access."""


def find_builder(name: str, data_dir: str = "", *, file_format: str | None = None) -> Any:
    """Returns the TFDS builder of `name` (`NAME`, `NAME/CONFIG`, with `:VERSION` if needed).

    Args:
        name: a dataset of this package (`vit_jax/data/builders`), of TFDS, or one only on disk.
        data_dir: the folder of prepared datasets; empty for the default of TFDS.
        file_format: the format of a dataset that is not prepared yet; None for the one on disk.
    """
    import tensorflow_datasets as tfds

    _import_no_features()
    short = name.partition(":")[0].partition("/")[0]
    if short in names_in(_BUILDERS):
        importlib.import_module(f"{_BUILDERS}.{short}")  # Registers it with TFDS.
    try:
        kwargs = {"file_format": file_format} if file_format else {}
        return tfds.builder(name, data_dir=data_dir or None, try_gcs=False, **kwargs)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = [*names_in(_BUILDERS), *tfds.list_builders(with_community_datasets=False)]
        hint = nearest(short, known, "tfds.list_builders() lists the names")
        raise UserError(f"TFDS has no dataset {name!r}; {hint}") from error
    # An unreachable bucket raises a RuntimeError or one of TensorFlow's own errors.
    except (ValueError, AssertionError, RuntimeError, OSError, tf.errors.OpError) as error:
        raise UserError(f"TFDS cannot open the dataset {name!r}: {first_line(error)}") from error


@functools.cache
def _import_no_features() -> None:
    """Keeps TFDS from importing the modules that `features.json` names: they may be anybody's.

    Features of TFDS are read as before, and so are those whose module the user has imported.
    """
    import tensorflow_datasets as tfds

    connector = tfds.features.FeatureConnector
    by_name = connector.cls_from_name

    def checked(name: str) -> type:
        if name not in connector._registered_features and not name.startswith(f"{tfds.__name__}."):
            module = name.rpartition(".")[0]
            raise ValueError(
                f"its features.json names {quoted(name)}, which is code from outside TFDS"
                f" and would run; if you trust it, import {module} in a plug-in that you name"
            )
        return by_name(name)

    connector.cls_from_name = staticmethod(checked)


def is_prepared(builder: Any) -> bool:
    """Returns whether the files of a builder's dataset exist and are complete."""
    return (builder.data_path / _INFO).exists()


def prepare(name: str, data_dir: str = "", manual_dir: str = "", tell: Tell = print) -> str:
    """Downloads and writes a dataset for random access; returns the folder it is in.

    The preparation is atomic: a dataset is written under a temporary name and renamed at the end,
    so an interrupted preparation is never mistaken for a dataset. An existing dataset is left
    unchanged. ImageNet, which cannot be downloaded, is built from archives in `manual_dir` (see
    `imagenet_tars`).
    """
    import tensorflow_datasets as tfds

    check_local(data_dir)
    builder = find_builder(name, data_dir)
    check_local(str(builder.data_path))  # TFDS's default may be a bucket, too.
    default = Path(builder.data_path).parents[1] / "downloads" / "manual"
    archives = Path(manual_dir).expanduser() if manual_dir else default
    if is_prepared(builder):
        if builder.name == imagenet_tars.NAME:
            imagenet_tars.refuse_missing_splits(builder, archives)
        if _is_tfrecord(builder):
            tell(
                f"{builder.data_path} is TFRecord, which is read as it is;"
                " --tfrecord=DIR --data_dir=ANOTHER_DIR converts it"
            )
        return str(builder.data_path)
    builder = find_builder(name, data_dir, file_format=FILE_FORMAT)
    if builder.name == imagenet_tars.NAME:
        imagenet_tars.build(builder, archives, tell)
        return str(builder.data_path)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # A file would get a line for each move of a bar.
    keys = {"manual_dir": manual_dir} if manual_dir else {}
    try:
        builder.download_and_prepare(
            file_format=FILE_FORMAT, download_config=tfds.download.DownloadConfig(**keys)
        )
    except AssertionError as error:
        # TFDS raises this error if files must be downloaded manually; it names their folder.
        raise UserError(" ".join(str(error).split())) from error
    except (OSError, tfds.download.DownloadError) as error:
        unwritable = isinstance(error, PermissionError) and not data_dir
        hint = "; --data_dir=DIR names another folder, and config.data.dir reads it"
        raise UserError(
            f"dataset {name!r} could not be prepared: {error}{hint if unwritable else ''}"
        ) from error
    return str(builder.data_path)


def convert_tfrecord(name: str, source_dir: str, data_dir: str, tell: Tell = print) -> str:
    """Writes the TFRecord build of a dataset in `source_dir` for random access into `data_dir`.

    Records are copied one by one without decoding, in the same order and into the same number of
    files. An interrupted conversion is resumed. Returns the folder.
    """
    if not data_dir:
        raise UserError("prepare: --tfrecord needs --data_dir=DIR, another folder to write to")
    check_local(data_dir)
    if Path(data_dir).expanduser().resolve() == Path(source_dir).expanduser().resolve():
        raise UserError("prepare: --data_dir must be another folder than that of --tfrecord")
    source = find_builder(name, source_dir)
    if not is_prepared(source):
        raise UserError(f"prepare: --tfrecord={source_dir} holds no dataset {name!r}")
    if not _is_tfrecord(source):
        raise UserError(f"{source.data_path} is {source.info.file_format.value}, not TFRecord")
    target = _target(source, name, data_dir)
    if is_prepared(target):
        return str(target.data_path)
    folder = shards.building_folder(target)
    lengths = {}
    for split, info in source.info.splits.items():
        counts = info.shard_lengths
        parts = [
            shards.Part(
                shards.file_name(target.name, split, number, len(counts)),
                count,
                functools.partial(checked_records, str(path)),
                shards.origin_of(path),
            )
            for number, (count, path) in enumerate(zip(counts, info.filepaths, strict=True))
        ]
        shards.write(parts, folder, shards.telling_of(split, tell))
        lengths[split] = counts
    shards.finish(target, lengths, folder)
    return str(target.data_path)


def _target(source: Any, name: str, data_dir: str) -> Any:
    """Returns the builder that writes the dataset of `source` into `data_dir`."""
    import tensorflow_datasets as tfds

    if not isinstance(source, tfds.core.read_only_builder.ReadOnlyBuilder):
        return find_builder(name, data_dir, file_format=FILE_FORMAT)
    # The dataset is known only from its files, so the builder is made from them; TFDS then assumes
    # that its folder is theirs.
    target = tfds.core.read_only_builder.builder_from_directory(source.data_path)
    target._data_dir = str(Path(data_dir).expanduser() / source.info.full_name)
    return target


def check_local(folder: str) -> None:
    """Raises a `UserError` for a folder on an object store, to which datasets are only copied."""
    if "://" in folder:
        raise UserError(
            f"prepare: --data_dir={folder}: datasets are written to a local disk; prepare there,"
            " then --copy_to=gs://... brings the dataset to a bucket"
        )


def copy(name: str, data_dir: str, destination: str, tell: Tell = print) -> str:
    """Copies a prepared dataset to another data_dir, such as `gs://bucket/tfds`.

    Existing files of the same size are not copied again, unless the checksums there are of other
    content. The checksums, and `dataset_info.json`, which makes the files a dataset, are copied
    last. Returns the folder.
    """
    builder = find_builder(name, data_dir)
    require_prepared(builder, name)
    source = epath.Path(builder.data_path)
    target = epath.Path(destination) / builder.info.full_name
    target.mkdir(parents=True, exist_ok=True)
    last = (shards.CHECKSUMS, _INFO)
    files = sorted(source.iterdir(), key=lambda path: (path.name in last, path.name))
    sums, former = shards.read_checksums(source), shards.read_checksums(target)
    for number, path in enumerate(files, 1):
        there = target / path.name
        if path.name in last:
            is_there = there.exists() and there.read_bytes() == path.read_bytes()
        else:
            is_there = there.exists() and there.stat().length == path.stat().length
            noted = former.get(path.name)
            is_there &= noted is None or shards.is_same(noted, sums.get(path.name, noted))
        if is_there:
            continue
        path.copy(there, overwrite=True)
        tell(f"{number} of {len(files)} files: {there}")
    return str(target)


def check(name: str, data_dir: str, tell: Tell = print) -> str:
    """Counts the records of every file and compares the available checksums.

    These are the checksums that the build wrote, and those of every record in TFRecord files.

    Raises:
      UserError: a file is missing, truncated, or changed (the message names the first), or the
        counts of ImageNet differ from the published counts.
    """
    builder = find_builder(name, data_dir)
    require_prepared(builder, name)
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
    compared = sums or _is_tfrecord(builder)
    tell("checksums agree" if compared else "no checksums were noted when this was written")
    return str(builder.data_path)


def _check_file(instruction: Any, sums: Mapping[str, Mapping[str, Any]]) -> None:
    path = epath.Path(instruction.filename)
    if not path.exists():
        raise UserError(f"{path} is missing; prepare or copy the dataset again")
    noted = sums.get(path.name)
    if noted and not shards.is_same(noted, shards.checksum(path)):
        raise UserError(f"{path} has changed since it was written; prepare or copy it again")
    found = _count(path)
    if found not in (None, instruction.examples_in_shard):
        raise UserError(f"{path} has {found} of {instruction.examples_in_shard} records")


def _count(path: epath.Path) -> int | None:
    """Returns the number of records in a file; None if it cannot be determined."""
    if ".tfrecord" in path.name:
        return sum(1 for _ in checked_records(str(path)))
    if ".array_record" in path.name and "://" not in str(path):
        from array_record.python import array_record_module

        return array_record_module.ArrayRecordReader(str(path)).num_records()
    return None


def _is_tfrecord(builder: Any) -> bool:
    import tensorflow_datasets as tfds

    return builder.info.file_format is tfds.core.file_adapters.FileFormat.TFRECORD


def require_prepared(builder: Any, name: str) -> None:
    """Raises a `UserError` unless the dataset of a builder is there and complete."""
    if not is_prepared(builder):
        raise UserError(f"dataset {name!r} is not in {builder.data_path}; prepare it first")
