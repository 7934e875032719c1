"""Functions that write a TFDS dataset file by file, so that an interrupted build can be resumed.

TFDS itself writes a dataset in one piece and restarts after every interruption. Here each file is
written under a temporary name and renamed when it is complete, and its checksum is stored. The
folder gets its final name last, so an incomplete folder is never mistaken for a dataset.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from vit_jax import storage
from vit_jax.data import files
from vit_jax.errors import UserError, first_line
from vit_jax.storage import try_lock

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
_ORIGIN = "origin"
_CHUNK = 16 << 20
_TELL_SECONDS = 10.0

Tell = Callable[[str], None]


def telling_of(split: str, tell: Tell) -> Tell:
    """Returns `tell` with the name of a split before every line."""
    return lambda line: tell(f"{split}: {line}")


class Part(NamedTuple):
    """A file to be written: its name, its number of records, and a source of their bytes.

    origin: what changes with the source; a file that was written from another one is written again.
    """

    file_name: str
    num_records: int
    read: Callable[[], Iterator[bytes]]
    origin: str = ""


def origin_of(path: epath.PathLike) -> str:
    """Returns the `Part.origin` of what is made from one file: a hash of its place and version."""
    place = os.fspath(path) if storage.is_remote(path) else os.path.abspath(path)
    told = f"{place} {epath.Path(path).stat().length} {files.version(path)}"
    return hashlib.sha256(os.fsencode(told)).hexdigest()[:16]


def write(parts: Sequence[Part], folder: Path, tell: Tell) -> dict[str, dict[str, Any]]:
    """Writes the parts that `folder` does not have yet, as `array_record`.

    Returns {file name: {"size", "sha256", "origin"}} of all parts. Calls `tell` with a line of
    progress every ten seconds. A file that was written from another origin is written again.

    Raises:
      UserError: another process writes there, whose files would be mixed with these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        return _write(parts, folder, tell)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes of this host from writing into a folder until the block ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        is_ours = try_lock(handle)
        if is_ours is False:
            raise UserError(f"another process prepares {folder}; wait until it ends")
        if is_ours is None:
            logger.info("%s is on a file system without locks", folder)
        yield
    finally:
        os.close(handle)


def _write(parts: Sequence[Part], folder: Path, tell: Tell) -> dict[str, dict[str, Any]]:
    sums = read_checksums(folder)
    todo = [
        part
        for part in parts
        if part.file_name not in sums or sums[part.file_name].get(_ORIGIN, "") != part.origin
    ]
    if len(todo) < len(parts):
        tell(f"{len(parts) - len(todo)} of {len(parts)} files are there already")
    started = told = time.monotonic()
    records = 0
    for number, part in enumerate(todo, 1):
        sums[part.file_name] = {**_write_part(part, folder), _ORIGIN: part.origin}
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
    """Returns the size and SHA-256 of a local or remote file."""
    digest, size = hashlib.sha256(), 0
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def read_checksums(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
    """Returns the checksums that `write` stored in a folder; empty if there are none."""
    path = epath.Path(folder) / CHECKSUMS
    if not path.exists():
        return {}
    try:
        found = storage.parse_json(path.read_bytes())
        return {str(name): dict(entry) for name, entry in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}); delete it, and what was written is checked"
            " no more, or written again"
        ) from error


def is_same(noted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Returns whether two checksums are those of one content."""
    return all(noted.get(name) == found.get(name) for name in ("size", "sha256"))


def forget(folder: Path, prefix: str) -> None:
    """Deletes the written files whose names begin with `prefix`; `write` writes them again."""
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
    """Turns a folder of written parts into a TFDS dataset and renames it to its final name.

    lengths: for each split, the number of records in each of its files, in order.
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
    # The builder may have the metadata of the source dataset, which has another format.
    builder.info.set_file_format(file_format, override=True, override_if_initialized=True)
    builder.info.set_splits(tfds.core.splits.SplitDict(splits))
    builder.info.write_to_directory(folder)
    destination = Path(builder.data_path)
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(destination)


def file_name(dataset: str, split: str, number: int, count: int) -> str:
    """Returns the name that TFDS gives to a file of a split."""
    return f"{dataset}-{split}.array_record-{number:05d}-of-{count:05d}"


def building_folder(builder: Any) -> Path:
    """Returns the folder of a dataset until it is complete."""
    path = Path(builder.data_path)
    return path.with_name(f"{path.name}.building")
