"""Reading named arrays out of `.npz`, `.safetensors` and torch files.

Nothing of a file is run, and nothing is allocated before the file has been checked to hold it.
"""

import contextlib
import functools
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import BinaryIO, cast

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from vit_jax.checkpoints import file_array, files, torch_file
from vit_jax.checkpoints.file_array import FileArray, OpenFile
from vit_jax.errors import UserError

MAX_EXPANSION = 10
"""Largest ratio of the arrays' size to the file's. Weights hardly compress; zero heads do."""

ALWAYS_ALLOWED = 64 << 20
"""Bytes that may be unpacked from a file of any size."""

MAX_HEADER = 16 << 20
"""Bytes of the largest header of a `.safetensors` file and directory of a zip file."""

MAX_NPY_HEADER = 10_000

_LAZY = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The types of numbers in `.safetensors` files of which parts are read."""

Arrays = dict[str, np.ndarray]


class Readers(dict[str, Callable[[], np.ndarray]]):
    """Functions that read one array each, by the array's name, while the file is open.

    metadata: the texts that the header of a `.safetensors` file holds beside the arrays.
    """

    metadata: Mapping[str, str] = MappingProxyType({})


def read_arrays(path: epath.PathLike) -> Arrays:
    """Returns all arrays of an `.npz`, `.safetensors`, `.bin` or `.pth` file.

    The kind of file is recognized by its content. Floating-point arrays come as float32; large ones
    of a `.safetensors` file are views of the file, see `FileArray`.

    Raises:
      UserError: the file is none of these, is broken, fails a checksum, holds pickled objects or
        values that are not finite, or would unpack to far more than its own size.
    """
    with open_arrays(path) as readers:
        return read_all(readers, path)


def read_all(readers: Readers, path: epath.PathLike) -> Arrays:
    """Returns the arrays of an open file, as `read_arrays` does."""
    if not readers:
        raise UserError(f"{path} holds no arrays")
    arrays = {}
    # The same array of all blocks in turn: when they are stacked, they leave one gap in memory that
    # the next stack fits in, where gaps between other arrays would double what the process holds.
    for name in sorted(readers, key=lambda name: re.sub(r"\d+", "", name, count=1)):
        with files.reading(f"{path}: {name}"):
            arrays[name] = _as_float32(readers[name](), f"{path}: {name}")
    return arrays


@contextlib.contextmanager
def open_arrays(path: epath.PathLike) -> Iterator[Readers]:
    """Opens a file and yields a function for each of its arrays; see `read_arrays`."""
    with contextlib.ExitStack() as stack:
        with files.reading(path):
            name = stack.enter_context(files.local_file(path))
            file = stack.enter_context(open(name, "rb"))
            readers = _open(name, file, path, stack)
        yield readers


def _open(name: str, file: BinaryIO, path: epath.PathLike, stack: contextlib.ExitStack) -> Readers:
    size = os.path.getsize(name)
    head = file.read(9)
    if head[:4] == b"PK\x03\x04":
        archive = stack.enter_context(zipfile.ZipFile(_Bounded(file)))
        members = archive.infolist()
        _check_expansion(sum(member.file_size for member in members), size, path)
        if any(PurePosixPath(member.filename).name == "data.pkl" for member in members):
            return _checked(torch_file.open_zip(archive, path), size, path)
        return Readers(_open_npz(archive, size, path))
    if len(head) == 9 and head[8:9] == b"{":
        return _open_safetensors(name, head, path, stack)
    if head[:1] == b"\x80":
        return _checked(torch_file.open_legacy(file, path), size, path)
    raise UserError(
        f"{path} is no checkpoint: neither an .npz, a .safetensors nor a torch file (it may be cut"
        " short, or a page that was downloaded in its place)"
    )


class _Bounded:
    """A file for `zipfile`, which reads the whole directory of an archive at once."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if count > MAX_HEADER:
            raise ValueError(
                f"a part of {count} bytes, where at most {MAX_HEADER} are read at once"
            )
        return self._file.read(count)


def _check_expansion(declared: int, size: int, path: epath.PathLike) -> None:
    if declared > ALWAYS_ALLOWED + MAX_EXPANSION * size:
        raise UserError(
            f"{path} has {size} bytes and would unpack to {declared}: no checkpoint compresses"
            " like that"
        )


def _check_shape(shape: tuple[int, ...], size: int, where: str) -> None:
    """An array without elements may have any shape, of which others are made."""
    if min(shape, default=0) < 0 or max(shape, default=0) > size:
        raise UserError(f"{where} has shape {list(shape)}, in a file of {size} bytes")


def _open_npz(
    archive: zipfile.ZipFile, size: int, path: epath.PathLike
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    seen: set[str] = set()
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in seen or name == member.filename or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path} holds {member.filename!r}, which is no name of an array")
        seen.add(name)
        yield name, functools.partial(_read_npy, archive, member, size, f"{path}: {name}")


def _read_npy(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: int, where: str
) -> np.ndarray:
    """Reads a member to its end, where `zipfile` compares its checksum."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(stream, max_header_size=MAX_NPY_HEADER)
        header = stream.tell()
    if dtype.hasobject:
        raise UserError(f"{where} holds pickled objects, which are never read")
    if dtype.kind not in "fiubV" or not dtype.itemsize or dtype.subdtype:
        raise UserError(f"{where} has dtype {dtype}, not numbers")
    _check_shape(shape, size, where)
    declared = math.prod(shape) * dtype.itemsize
    if header + declared != member.file_size:
        raise UserError(f"{where} declares {declared} bytes and holds {member.file_size - header}")
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False, max_header_size=MAX_NPY_HEADER)


def _open_safetensors(
    name: str, head: bytes, path: epath.PathLike, stack: contextlib.ExitStack
) -> Readers:
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER:
        raise UserError(f"{path} is broken or cut short: its header claims {length} bytes")
    # Read, not mapped: a file that another process cuts short would kill this one.
    file = stack.enter_context(safetensors.safe_open(name, framework="numpy", backend="pread"))
    size = os.path.getsize(name)
    for key in file.keys():  # noqa: SIM118 (it is no mapping)
        _check_shape(tuple(file.get_slice(key).get_shape()), size, f"{path}: {key}")
    readers = Readers((key, functools.partial(file.get_tensor, key)) for key in file.keys())  # noqa: SIM118
    readers.metadata = file.metadata() or {}
    readers.update(_large(name, length, path))
    return readers


def _large(
    name: str, length: int, path: epath.PathLike
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Yields functions that return views of the large arrays of a file, whose header is valid."""
    file, data = OpenFile(name), np.empty(length, np.uint8)
    file.read_into(data, 8)
    header = json.loads(data.tobytes())
    header.pop("__metadata__", None)
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] in _LAZY and end - begin >= file_array.LEAST:
            stored, start = _LAZY[entry["dtype"]], 8 + length + begin
            view = FileArray(file, f"{path}: {key}", stored, start, entry["shape"])
            # It does all that formats do with arrays.
            yield key, functools.partial(cast, np.ndarray, view)


def _checked(tensors: torch_file.Tensors, size: int, path: epath.PathLike) -> Readers:
    """Tensors may share their storage, so that all together are larger than the file."""
    for name, tensor in tensors.by_name.items():
        tensor.check(f"{path}: {name}")
        _check_shape(tensor.shape, size, f"{path}: {name}")
    _check_expansion(sum(tensor.nbytes for tensor in tensors.by_name.values()), size, path)
    return Readers((name, functools.partial(tensors.read, name)) for name in tensors.by_name)


def _as_float32(array: np.ndarray, where: str) -> np.ndarray:
    if isinstance(array, FileArray):
        return array
    if array.dtype == np.dtype("V2"):
        # bfloat16, whose name .npy cannot write.
        array = array.view(ml_dtypes.bfloat16)
    if array.dtype.kind in "iub":
        return array
    try:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} has dtype {array.dtype}, not numbers") from error
    file_array.check_finite(array, where)
    return array
