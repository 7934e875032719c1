"""Tensors of files that `torch.save` wrote (`.pth`, `.bin`), read without torch.

Since torch 1.6 such a file is a zip archive: `NAME/data.pkl` is a pickle of the saved object, whose
tensors refer to storages by key, and `NAME/data/KEY` holds the bytes of a storage. Older files are
five pickles in a row (a magic number, a version, the machine, the object, the keys), after which
come the storages in the order of their keys.

No code of a file is ever run. The unpickler knows how tensors are made and nothing else: every
other class or function that a pickle names becomes an inert `Unread` object, so that a training
checkpoint with its arguments and its optimizer can be read for its weights.
"""

import collections
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from vit_jax.errors import UserError

MAX_PICKLE = 8 << 20
"""Bytes of the largest pickle that is read, which may take 100 times as much memory."""

MAX_CLASSES = 1000
"""Classes and functions that a pickle may name."""

LEGACY_HEAD = (0x1950A86A20F9469CFC6C, 1001)
"""The magic number and the version at the start of a file of torch before 1.6."""

_SIZE = struct.Struct("<q")

_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

_REFUSED = ("EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER")
"""Opcodes of no use here: they read registries of the process, or large objects."""


class Unread:
    """An object of a class that is not known here. Whatever a pickle does to it is ignored."""

    of = ""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


class _Dict(dict):
    """A dictionary whose attributes, such as the versions of a state dict, are ignored."""

    def __setstate__(self, state: Any) -> None:
        pass


class Storage(NamedTuple):
    """A run of numbers in a file, of which tensors are views."""

    dtype: np.dtype
    key: str
    size: int


class Tensor(NamedTuple):
    """A view of the elements `offset`, `offset + stride`, ... of a storage.

    A tuple, since a pickle may set the attributes of other objects.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def check(self, where: str) -> None:
        """Raises a `UserError` unless the tensor lies in its storage and is no larger."""
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(
            type(number) is not int or number < 0 for number in numbers
        ):
            raise UserError(f"{where} has shape {self.shape} and strides {self.strides}")
        count = math.prod(self.shape)
        steps = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((length - 1) * stride for length, stride in steps)
        if count and (last >= self.storage.size or count > self.storage.size):
            raise UserError(
                f"{where} has {count} elements and is stored as {self.storage.size} numbers; save"
                " it with .clone()"
            )

    def view(self, stored: np.ndarray) -> np.ndarray:
        """Returns the elements, given the numbers of the storage."""
        strides = [stride * stored.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(
            stored[self.offset :], self.shape, strides, writeable=False
        )
        return np.ascontiguousarray(view).reshape(self.shape)


class Tensors:
    """The tensors of an open file, by name.

    Each storage is read once, and is forgotten when the last of its tensors has been read.
    """

    def __init__(self, tensors: Mapping[str, Tensor], load: Callable[[Storage], np.ndarray]):
        self.by_name = tensors
        self._load = load
        self._uses = collections.Counter(tensor.storage for tensor in tensors.values())
        self._held: dict[Storage, np.ndarray] = {}

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, of the type that it is stored in."""
        tensor = self.by_name[name]
        if not math.prod(tensor.shape):
            return np.empty(tensor.shape, tensor.storage.dtype)
        stored = self._held.pop(tensor.storage, None)
        stored = self._load(tensor.storage) if stored is None else stored
        self._uses[tensor.storage] -= 1
        if self._uses[tensor.storage] > 0:
            self._held[tensor.storage] = stored
        return tensor.view(stored)


class _Unpickler(pickle.Unpickler):
    """Makes tensors and plain values; `storages` are those that the pickle refers to."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.storages: dict[str, Storage] = {}
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Bound methods, since a pickle may set attributes of a function.
        known = {
            "collections.OrderedDict": self._dict,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter,
        }
        full = f"{module}.{name}"
        if full in known:
            return known[full]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if full not in self._classes:
            if len(self._classes) == MAX_CLASSES:
                raise ValueError(f"its pickle names more than {MAX_CLASSES} classes")
            self._classes[full] = type("Unread", (Unread,), {"of": full})
        return self._classes[full]

    def persistent_load(self, pid: Any) -> Storage | Unread:
        kind, dtype, key, _, size, *view = pid
        if isinstance(dtype, type) and issubclass(dtype, Unread):
            return dtype()
        well_formed = isinstance(dtype, np.dtype) and isinstance(key, str) and type(size) is int
        if kind != "storage" or not well_formed or size < 0 or any(view):
            raise ValueError(f"its pickle refers to {pid!r:.100}, which is no storage")
        return self.storages.setdefault(key, Storage(dtype, key, size))

    def _dict(self) -> _Dict:
        return _Dict()

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
        if isinstance(storage, Unread):
            return storage
        if not isinstance(storage, Storage):
            raise ValueError("its pickle makes a tensor of no storage")
        return Tensor(storage, offset, tuple(shape), tuple(strides))

    def _parameter(self, tensor: Any, *_: Any) -> Any:
        return tensor


def open_zip(archive: zipfile.ZipFile, path: epath.PathLike) -> Tensors:
    """Returns the tensors of a file of torch 1.6 or later, to be read while it is open.

    Raises:
      UserError: the file holds no state dict.
      Any other exception: the file is broken.
    """
    names = archive.namelist()
    main = next(name for name in names if name.rpartition("/")[2] == "data.pkl")
    folder = main.removesuffix("data.pkl")
    if archive.getinfo(main).file_size > MAX_PICKLE:
        raise UserError(f"{path} has a pickle of more than {MAX_PICKLE} bytes")
    if f"{folder}byteorder" in names:
        with archive.open(f"{folder}byteorder") as stream:
            if stream.read(100) != b"little":
                raise UserError(f"{path} is of a big-endian machine; save it on another")

    def load(storage: Storage) -> np.ndarray:
        """Reads a member to its end, where `zipfile` compares its checksum."""
        member = archive.getinfo(f"{folder}data/{storage.key}")
        declared = storage.size * storage.dtype.itemsize
        if member.file_size != declared:
            raise ValueError(f"{member.filename} has {member.file_size} bytes, not {declared}")
        with archive.open(member) as stream:
            return _read_storage(stream, storage)

    data = io.BytesIO(archive.read(main))
    return Tensors(_state_dict(_unpickle(data).load(), path), load)


def open_legacy(file: BinaryIO, path: epath.PathLike) -> Tensors:
    """Returns the tensors of a file of torch before 1.6; see `open_zip`."""
    file.seek(0)
    head = io.BytesIO(file.read(MAX_PICKLE))
    magic, version, machine = (_unpickle(head).load() for _ in range(3))
    if (magic, version) != LEGACY_HEAD or not machine["little_endian"]:
        raise UserError(f"{path} is no file that torch.save wrote on a little-endian machine")
    unpickler = _unpickle(head)
    saved, keys = unpickler.load(), _unpickle(head).load()
    places, end = {}, head.tell()
    for key in keys:
        places[key] = end
        end += _SIZE.size + unpickler.storages[key].size * unpickler.storages[key].dtype.itemsize
    if end != file.seek(0, io.SEEK_END):
        raise ValueError(f"its storages end at byte {end}")

    def load(storage: Storage) -> np.ndarray:
        file.seek(places[storage.key])
        if _SIZE.unpack(file.read(_SIZE.size)) != (storage.size,):
            raise ValueError(f"the storage {storage.key} has not {storage.size} numbers")
        return _read_storage(file, storage)

    return Tensors(_state_dict(saved, path), load)


def _unpickle(file: io.BytesIO) -> _Unpickler:
    """Returns an unpickler of the next pickle of a file, which it leaves behind."""
    start = file.tell()
    _check_opcodes(file)
    end = file.tell()
    file.seek(start)
    return _Unpickler(file.read(end - start))


def _check_opcodes(file: io.BytesIO) -> None:
    """Raises a `ValueError` for a pickle that does, or could allocate, more than data needs."""
    for count, (opcode, argument, place) in enumerate(pickletools.genops(file)):
        if opcode.name in _REFUSED:
            raise ValueError(f"its pickle has the opcode {opcode.name} at byte {place}")
        if opcode.name in ("PUT", "LONG_BINPUT") and argument is not None and argument > count:
            raise ValueError(f"its pickle has a memo of {argument} objects at byte {place}")


def _read_storage(stream: Any, storage: Storage) -> np.ndarray:
    array = np.empty(storage.size, storage.dtype)
    view, start = array.view(np.uint8).data, 0
    while start < len(view):
        count = stream.readinto(view[start : start + (1 << 20)])
        if not count:
            raise EOFError(f"the storage {storage.key} ends after {start} bytes")
        start += count
    return array


def _state_dict(saved: Any, path: epath.PathLike) -> Mapping[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(saved, Mapping) and isinstance(saved.get(wrapper), Mapping):
            saved = saved[wrapper]
    if not isinstance(saved, Mapping):
        kind = saved.of if isinstance(saved, Unread) else type(saved).__name__
        raise UserError(f"{path} holds a {kind}, not a state dict; save model.state_dict()")
    saved = {name: value for name, value in saved.items() if isinstance(name, str)}
    for name, value in saved.items():
        if isinstance(value, Unread) and value.of.startswith("torch."):
            raise UserError(
                f"{path}: {name} is stored with {value.of}, which is not read; save a dense tensor"
                " of plain numbers"
            )
    return {name: x for name, x in saved.items() if isinstance(x, Tensor)}
