"""Files that other people made: opening them safely, and writing ours so that they appear whole.

Every parser of foreign bytes runs inside `reading`, which turns whatever the parser raises into one
line that names the file. Only regular files are opened: a pipe, or a link to a device, could go on
for ever.
"""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import fsspec
import numpy as np
import safetensors.numpy
from etils import epath

from vit_jax import storage
from vit_jax.errors import UserError, first_line

MAX_JSON = 16 << 20
"""Bytes of the largest JSON file that is parsed, which may take 20 times as much memory."""

MAX_TEXT = 256 << 20
"""Bytes of the largest file that `read_bytes` reads."""

STORES = ("gs://", "s3://")
"""Addresses of object stores, where checkpoints of this package may lie too."""


@contextlib.contextmanager
def reading(place: epath.PathLike) -> Iterator[None]:
    """Turns any exception of the block into a `UserError` of one line that begins with `place`.

    place: the file, and where known the part of it that is parsed. A `UserError` passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Parsers of damaged bytes raise anything, MemoryError included.
        raise UserError(f"{place} is broken or cut short: {first_line(error)}") from error


@contextlib.contextmanager
def local_file(path: epath.PathLike) -> Iterator[str]:
    """Yields the name of a regular file with the content of `path`.

    That is `path` itself, or a temporary copy of what lies behind an address (`gs://`, `https://`,
    ...), since not every server lets readers seek in its files.

    Raises:
      UserError: there is no such file, it cannot be fetched, or it is a folder, pipe or device.
    """
    name = os.fspath(path)
    if not storage.is_remote(name):
        check_regular(name)
        yield name
        return
    with tempfile.NamedTemporaryFile(prefix="vit_jax_") as copy:
        try:
            _fetch(name, copy)
        except Exception as error:  # Libraries of object stores have errors of their own.
            raise UserError(f"cannot read {name}: {first_line(error)}") from error
        yield copy.name


def _fetch(name: str, copy: Any) -> None:
    """Copies a remote file into an open temporary file, a piece at a time."""
    if name.startswith(STORES):
        with epath.Path(name).open("rb") as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
    else:
        system, path = fsspec.core.url_to_fs(name)
        system.get_file(path, copy.name)


def check_regular(path: epath.PathLike) -> None:
    """Raises a `UserError` unless `path` is a regular file that can be looked at."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {os.fspath(path)}: {first_line(error)}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"{os.fspath(path)} is {kind}; give a regular file")


def check_tree(folder: epath.PathLike) -> None:
    """Raises a `UserError` if a local folder holds anything but regular files and folders."""
    if storage.is_remote(folder):
        return
    for place, _, names in os.walk(folder):
        for name in names:
            check_regular(os.path.join(place, name))


def read_bytes(path: epath.PathLike, most: int = MAX_TEXT) -> bytes:
    """Returns the content of a local or remote file.

    Raises:
      UserError: the file cannot be read, or has more than `most` bytes.
    """
    with local_file(path) as name:
        size = os.path.getsize(name)
        if size > most:
            raise UserError(f"{path} has {size} bytes; at most {most} are read of such a file")
        try:
            with open(name, "rb") as file:
                return file.read(size)
        except OSError as error:
            raise UserError(f"cannot read {path}: {first_line(error)}") from error


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Returns the content of a JSON file. Raises a `UserError` unless it is a JSON object."""
    data = read_bytes(path, MAX_JSON)
    try:
        value = storage.parse_json(data)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def write_npz(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz` file, which appears whole or not at all."""
    named: dict[str, Any] = dict(arrays)
    _write(path, lambda file: np.savez(file, **named))


def write_safetensors(
    path: epath.PathLike, arrays: Mapping[str, np.ndarray], **metadata: str
) -> None:
    """Writes float32 arrays as a `.safetensors` file, which appears whole or not at all."""
    _write(path, lambda file: file.write(safetensors_bytes(arrays, **metadata)))


def safetensors_bytes(arrays: Mapping[str, np.ndarray], **metadata: str) -> bytes:
    """Returns the content of a `.safetensors` file with float32 arrays."""
    contiguous = {name: np.asarray(x, np.float32, order="C") for name, x in arrays.items()}
    # Readers of transformers insist on the metadata.
    return safetensors.numpy.save(contiguous, metadata={"format": "pt", **metadata})


def _write(path: epath.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    target = epath.Path(path).expanduser()
    if target.is_dir():
        raise UserError(f"{path} is a directory; name a file in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile() if storage.is_remote(path) else _scratch(target) as file:
            write(file)
            if storage.is_remote(path):
                file.seek(0)
                storage.write_atomically(target, file.read())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


@contextlib.contextmanager
def _scratch(target: epath.Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the name `target` when the block ends without an error."""
    with storage.writing_whole(target) as name, open(name, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_directory(path: epath.PathLike, files: Mapping[str, bytes]) -> None:
    """Writes a directory of files that appears when it is complete.

    Raises:
      UserError: there is something at `path` already, or it cannot be written.
    """
    target = epath.Path(path)
    if target.exists():
        raise UserError(f"{path} exists; remove it or write to another place")
    scratch = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        for name, data in files.items():
            (scratch / name).write_bytes(data)
        scratch.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        if scratch.exists():
            scratch.rmtree()
