"""Reading arrays out of files that other people made, and writing ours so that they appear whole.

Nothing here unpickles, and nothing is allocated before the file has been checked to hold it.
"""

import io
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec
import ml_dtypes
import numpy as np
from etils import epath

from vit_jax.errors import UserError
from vit_jax.storage import write_atomically

MAX_EXPANSION = 100
"""Largest ratio of the arrays' size to the file's. Weights hardly compress; zero heads do."""

ALWAYS_ALLOWED = 64 << 20
"""Bytes that may be unpacked from a file of any size."""

MAX_JSON = 100 << 20

STORES = ("gs://", "s3://")
"""Addresses of object stores, where checkpoints of ours may lie too."""

Arrays = dict[str, np.ndarray]

# What the readers below raise over damaged input; RuntimeError is zipfile's word for encryption.
_BROKEN = (OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, ValueError,
           NotImplementedError, RuntimeError, OverflowError)  # fmt: skip


def read_bytes(path: epath.PathLike) -> bytes:
    """The content of a local or remote file. Raises `UserError` if it cannot be read."""
    with open_file(path) as file:
        return file.read()


def open_file(path: epath.PathLike) -> BinaryIO:
    """A local file, or one behind an address (`gs://`, `https://`, ...), fetched whole."""
    name = os.fspath(path)
    try:
        if "://" not in name:
            return open(name, "rb")
        if name.startswith(STORES):
            return io.BytesIO(epath.Path(name).read_bytes())
        # Not every server lets one seek in its files.
        with fsspec.open(name, "rb") as file:
            return io.BytesIO(file.read())
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot read {name}: {error}") from error
    except Exception as error:
        if "://" in name:  # Libraries of object stores have errors of their own.
            raise UserError(f"cannot read {name}: {first_line(error)}") from error
        raise


def first_line(error: Exception) -> str:
    """What an error says, without the pages that some libraries append."""
    return (str(error).strip().splitlines() or [repr(error)])[0][:200]


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """A JSON object. Raises `UserError` for anything else."""
    try:
        value = json.loads(read_bytes(path)[:MAX_JSON])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def read_arrays(path: epath.PathLike) -> Arrays:
    """All arrays of an `.npz`, `.safetensors`, `.bin` or `.pth` file, told apart by content.

    Floating-point arrays come as float32.

    Raises:
      UserError: the file is none of these, broken, holds pickled objects or values that are not
        finite, or would unpack to far more than its own size.
    """
    try:
        with open_file(path) as file:
            arrays = _read_open(file, path)
    except _BROKEN as error:
        raise UserError(f"{path} is broken or cut short: {error}") from error
    if not arrays:
        raise UserError(f"{path} holds no arrays")
    return {name: _as_float32(name, array, path) for name, array in arrays.items()}


def _read_open(file: BinaryIO, path: epath.PathLike) -> Arrays:
    head = file.read(9)
    file.seek(0, io.SEEK_END)
    size = file.tell()
    file.seek(0)
    if head[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.filename.endswith("data.pkl") for member in members):
                return _read_torch(file, path)
            return dict(_read_npz(archive, size, path))
    if len(head) == 9 and head[8:9] == b"{":
        return _read_safetensors(file, size, path)
    if head[:1] == b"\x80":
        return _read_torch(file, path)
    raise UserError(
        f"{path} is no checkpoint: neither an .npz, a .safetensors nor a torch file (it may be cut"
        " short, or a page that was downloaded in its place)"
    )


def _read_npz(
    archive: zipfile.ZipFile, size: int, path: epath.PathLike
) -> Iterator[tuple[str, np.ndarray]]:
    declared = sum(member.file_size for member in archive.infolist())
    _check_expansion(declared, size, path)
    seen: set[str] = set()
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in seen or name == member.filename or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path} holds {member.filename!r}, which is no name of an array")
        seen.add(name)
        with archive.open(member) as stream:
            yield name, _read_npy(stream, member.file_size, f"{path}: {name}")


def _read_npy(stream: Any, size: int, where: str) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read_header(stream)
    except (ValueError, KeyError) as error:
        raise UserError(f"{where} has no readable header: {error}") from error
    if dtype.hasobject:
        raise UserError(f"{where} holds pickled objects, which are never read")
    bytes_needed = math.prod(shape) * dtype.itemsize
    header = stream.tell()
    if header + bytes_needed != size:
        raise UserError(f"{where} declares {bytes_needed} bytes and holds {size - header}")
    array = np.frombuffer(stream.read(bytes_needed), dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


def _check_expansion(declared: int, size: int, path: epath.PathLike) -> None:
    if declared > max(ALWAYS_ALLOWED, MAX_EXPANSION * size):
        raise UserError(
            f"{path} has {size} bytes and would unpack to {declared}: no checkpoint compresses"
            " like that"
        )


_SAFETENSORS_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def _read_safetensors(file: BinaryIO, size: int, path: epath.PathLike) -> Arrays:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, MAX_JSON):
        raise UserError(f"{path} is broken or cut short: its header claims {length} bytes")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {
            name: (_SAFETENSORS_TYPES[e["dtype"]], tuple(map(int, e["shape"])), e["data_offsets"])
            for name, e in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a broken safetensors header: {error!r}") from error
    data = file.read()
    end = 0
    arrays = {}
    for name, (dtype, shape, offsets) in sorted(entries.items(), key=lambda e: e[1][2]):
        # Contiguous by the format's definition: overlaps and holes hide things.
        needed = end + math.prod(shape) * dtype.itemsize
        if list(offsets) != [end, needed] or min(shape, default=0) < 0 or needed > len(data):
            raise UserError(f"{path} is broken or cut short: {name} lies at {offsets}")
        arrays[name] = np.frombuffer(data[end:needed], dtype).reshape(shape)
        end = needed
    if end != len(data):
        raise UserError(f"{path} holds {len(data) - end} bytes that belong to no array")
    return arrays


def _read_torch(file: BinaryIO, path: epath.PathLike) -> Arrays:
    """A torch file's state dict, by torch's reader that refuses code."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} is a torch file, and torch is not installed; install it, or save the weights "
            "as .safetensors"
        ) from error
    file.seek(0)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # Whatever a broken or hostile pickle provokes.
        line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{path} cannot be read as weights alone: {line[:200]}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict")
    tensors = {name: x for name, x in state.items() if isinstance(x, torch.Tensor)}
    return {
        name: (x.float() if x.is_floating_point() else x).numpy(force=True)
        for name, x in tensors.items()
    }


def _as_float32(name: str, array: np.ndarray, path: epath.PathLike) -> np.ndarray:
    if array.dtype == np.dtype("V2"):
        # bfloat16, whose name .npy cannot write.
        array = array.view(ml_dtypes.bfloat16)
    if array.dtype.kind in "iub":
        return array
    try:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {name} has dtype {array.dtype}, not numbers") from error
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} holds values that are not finite (NaN or infinity)")
    return array


def write_npz(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz` that is there whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _write(path, buffer.getvalue())


def write_safetensors(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes float32 arrays as `.safetensors`, there whole or not at all."""
    _write(path, safetensors_bytes(arrays))


def safetensors_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """float32 arrays in the safetensors format, in the order of their names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(arrays):
        start, end = end, end + arrays[name].size * 4
        shape = list(arrays[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = [np.ascontiguousarray(arrays[name], "<f4").tobytes() for name in sorted(arrays)]
    return b"".join([struct.pack("<Q", len(text)), text, *data])


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


def _write(path: epath.PathLike, data: bytes) -> None:
    target = epath.Path(path).expanduser()
    if target.is_dir():
        raise UserError(f"{path} is a directory; name a file in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
