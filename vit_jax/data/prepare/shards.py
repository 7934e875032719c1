"""Writing a TFDS dataset file by file, so that an interrupted build goes on where it stopped.

TFDS writes a dataset in one piece and starts anew after every interruption. Here each file is
written under another name and renamed when it is whole, and its checksum noted; the folder itself
gets its final name at the very end, so that nothing half-done is ever taken for a dataset.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from vit_jax.errors import UserError

CHECKSUMS = "checksums.json"
_CHUNK = 16 << 20
_TELL_SECONDS = 10.0

Tell = Callable[[str], None]


class Part(NamedTuple):
    """One file to be written: its name, its number of records, and where their bytes come from."""

    file_name: str
    num_records: int
    read: Callable[[], Iterator[bytes]]


def write(parts: Sequence[Part], folder: Path, tell: Tell) -> dict[str, dict[str, Any]]:
    """Writes the parts that `folder` does not have yet, as `array_record`.

    Returns {file name: {"size", "sha256"}} of all. `tell` gets a line every ten seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sums = read_checksums(folder)
    todo = [part for part in parts if part.file_name not in sums]
    if len(todo) < len(parts):
        tell(f"{len(parts) - len(todo)} of {len(parts)} files are there already")
    started = told = time.monotonic()
    records = 0
    for number, part in enumerate(todo, 1):
        sums[part.file_name] = _write_part(part, folder)
        _write_json(folder / CHECKSUMS, sums)
        records += part.num_records
        if time.monotonic() - told > _TELL_SECONDS or number == len(todo):
            told = time.monotonic()
            left = (told - started) / number * (len(todo) - number)
            rate = records / max(told - started, 1e-9)
            tell(f"file {number} of {len(todo)}, {rate:.0f} images/s, {left / 60:.0f} min left")
    return sums


def _write_part(part: Part, folder: Path) -> dict[str, Any]:
    from array_record.python import array_record_module

    unfinished = folder / f"{part.file_name}.incomplete"
    writer = array_record_module.ArrayRecordWriter(str(unfinished), "group_size:1")
    count = 0
    for record in part.read():
        writer.write(record)
        count += 1
    writer.close()
    if count != part.num_records:
        raise UserError(f"{part.file_name}: {count} records came, {part.num_records} were expected")
    unfinished.rename(folder / part.file_name)
    return checksum(folder / part.file_name)


def checksum(path: epath.PathLike) -> dict[str, Any]:
    """Size and SHA-256 of a file, local or remote."""
    digest, size = hashlib.sha256(), 0
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def read_checksums(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
    """What `write` noted in a folder; empty where it noted nothing."""
    path = epath.Path(folder) / CHECKSUMS
    return json.loads(path.read_text()) if path.exists() else {}


def forget(folder: Path, prefix: str) -> None:
    """Deletes the written files whose names begin so; `write` will write them anew."""
    sums = read_checksums(folder)
    names = {name for name in sums if name.startswith(prefix)}
    _write_json(folder / CHECKSUMS, {name: sums[name] for name in sums if name not in names})
    for name in names:
        (folder / name).unlink()


def _write_json(path: Path, content: Mapping) -> None:
    unfinished = path.with_suffix(".incomplete")
    unfinished.write_text(json.dumps(content, indent=1))
    unfinished.rename(path)


def finish(builder: Any, lengths: Mapping[str, Sequence[int]], folder: Path) -> None:
    """Makes a TFDS dataset of a folder of written parts, and gives it its name.

    lengths: of each split the number of records of each of its files, in order.
    """
    import tensorflow_datasets as tfds

    sums = read_checksums(folder)
    file_format = tfds.core.file_adapters.FileFormat.ARRAY_RECORD
    splits = []
    for name, counts in lengths.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(folder),
            dataset_name=builder.name,
            split=name,
            filetype_suffix=file_format.file_suffix,
        )
        size = sum(
            sums[file_name(builder.name, name, i, len(counts))]["size"] for i in range(len(counts))
        )
        splits.append(tfds.core.SplitInfo(name, list(counts), size, template))
    # The information may be that of the dataset which these are the records of.
    builder.info.set_file_format(file_format, override=True, override_if_initialized=True)
    builder.info.set_splits(tfds.core.splits.SplitDict(splits))
    builder.info.write_to_directory(folder)
    destination = Path(builder.data_path)
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(destination)


def file_name(dataset: str, split: str, number: int, count: int) -> str:
    """The name that TFDS gives to a file of a split."""
    return f"{dataset}-{split}.array_record-{number:05d}-of-{count:05d}"


def building_folder(builder: Any) -> Path:
    """Where a dataset grows until it is whole."""
    path = Path(builder.data_path)
    return path.with_name(f"{path.name}.building")
