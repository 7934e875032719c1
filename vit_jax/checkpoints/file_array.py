"""Arrays that stay in their file until a part of them is needed.

A large checkpoint is loaded without its whole ever being in the memory of a host: formats rename,
transpose and split the arrays, which makes views, and each device reads the part that it keeps.
"""

import math
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from vit_jax.checkpoints import files
from vit_jax.errors import UserError

LEAST = 1 << 20
"""Bytes of the smallest array of a file that is not read at once."""

CHUNK = 1 << 20
"""Bytes that are read at a time. They are checked and copied while they are in the cache."""

SHORT_RUN = 1 << 12
"""Bytes of a page, which is read as a whole: shorter parts of one array are read with what is
between them."""


def check_finite(array: np.ndarray, where: str) -> None:
    """Raises a `UserError` if a floating-point array holds NaN or an infinity."""
    # A NaN or an infinity stays one in the sum, which needs one pass and no array of answers. Only
    # a sum that overflows has to be looked at again.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum()) or not array.size:
            return
    if not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise UserError(f"{where} holds values that are not finite (NaN or infinity)")


THREADS = 4
"""Threads that read the arrays of a stack, each an array of its own."""


class OpenFile:
    """A file that is open for as long as something refers to it, even after it was deleted."""

    def __init__(self, name: str):
        self._descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, data: np.ndarray, start: int) -> None:
        """Fills `data` with bytes of the file. Raises `EOFError` if it ends before them."""
        # Read, not mapped: a file that another process cuts short would kill this one.
        done = 0
        while done < len(data):
            got = os.preadv(self._descriptor, [data[done:].data], start + done)
            if not got:
                raise EOFError(f"the file ends before byte {start + len(data)}")
            done += got


class FileArray(np.lib.mixins.NDArrayOperatorsMixin):
    """A view of an array of floating-point numbers in a file, as float32.

    Slices, transposition and most changes of shape make other views. Anything else reads the array
    and does what NumPy does with it. Every part that is read is checked to be finite.

    Args:
      file, where: the file, and its name and the array's for messages.
      stored: the type of the numbers in the file.
      start: the byte of the first number.
      shape, strides: the lengths of the axes, and the bytes from one element to the next.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        file: OpenFile,
        where: str,
        stored: np.dtype,
        start: int,
        shape: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
    ):
        self.shape = tuple(shape)
        self._file, self._where, self._stored, self._start = file, where, stored, start
        if strides is None:
            strides = [math.prod(shape[i + 1 :]) * stored.itemsize for i in range(len(shape))]
        self._strides = tuple(strides)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> "FileArray":
        return self.transpose()

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"FileArray({self._where}, {list(self.shape)})"

    def _view(self, shape: Sequence[int], strides: Sequence[int], start: int = 0) -> "FileArray":
        place = self._start + start
        return FileArray(self._file, self._where, self._stored, place, shape, strides=strides)

    def transpose(self, *axes: Any) -> "FileArray":
        """Returns a view with its axes in another order; see `numpy.ndarray.transpose`."""
        if len(axes) == 1 and not isinstance(axes[0], int):
            (axes,) = axes
        order = [*axes] if axes and axes[0] is not None else [*range(self.ndim)][::-1]
        return self._view([self.shape[i] for i in order], [self._strides[i] for i in order])

    def swapaxes(self, first: int, second: int) -> "FileArray":
        """Returns a view with two axes exchanged, which `numpy.split` asks for."""
        order = [*range(self.ndim)]
        order[first], order[second] = order[second], order[first]
        return self.transpose(order)

    def reshape(self, *shape: Any) -> Any:
        """Returns the array in another shape, a view where possible; see `numpy.reshape`."""
        wanted = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else [*shape]
        known = math.prod(n for n in wanted if n != -1)
        if wanted.count(-1) == 1 and known:
            wanted[wanted.index(-1)] = self.size // known
        strides = None
        if math.prod(wanted) == self.size and min(wanted, default=0) > 0:
            strides = _reshaped(self.shape, self._strides, wanted)
        return np.asarray(self).reshape(*shape) if strides is None else self._view(wanted, strides)

    def __getitem__(self, index: Any) -> Any:
        parts = [*index] if isinstance(index, tuple) else [index]
        if not all(isinstance(part, int | slice) for part in parts) or len(parts) > self.ndim:
            return np.asarray(self)[index]
        start, shape, strides = 0, [], []
        parts += [slice(None)] * (self.ndim - len(parts))
        for part, length, stride in zip(parts, self.shape, self._strides, strict=True):
            if isinstance(part, int):
                start += range(length)[part] * stride
            else:
                places = range(length)[part]
                if places.step < 0:
                    return np.asarray(self)[index]
                start += places.start * stride
                shape.append(len(places))
                strides.append(places.step * stride)
        return self._view(shape, strides, start)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        out = stack([self])[0, ...]
        return out if dtype is None else out.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        read = (np.asarray(x) if isinstance(x, FileArray) else x for x in inputs)
        return getattr(ufunc, method)(*read, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    @property
    def file_order(self) -> list[int]:
        """The axes in the order in which the file has them, the slowest first."""
        return sorted(range(self.ndim), key=lambda i: -self._strides[i])

    def read_into(self, out: np.ndarray) -> None:
        """Reads the array into one of the same shape.

        Raises:
          UserError: the file is shorter than it was, or a number is not finite.
        """
        if self.size:
            order, scratch = self.file_order, np.empty(CHUNK, np.uint8)
            with files.reading(self._where):
                self.transpose(order)._read_in_order(out.transpose(order), scratch)

    def _read_in_order(self, out: np.ndarray, scratch: np.ndarray) -> None:
        """Reads a view whose axes are in the order of the file, a chunk at a time."""
        size = self._stored.itemsize
        steps = zip(self.shape, self._strides, strict=True)
        span = sum((length - 1) * stride for length, stride in steps) + size
        run = math.prod(self.shape[1:]) * size
        together = self.ndim < 2 or run < SHORT_RUN or 2 * self.size * size >= span
        if together and span <= len(scratch):
            self._read_span(out, scratch[:span])
        elif together and len(self) > 1:
            rows = max(1, len(scratch) // self._strides[0])
            for first in range(0, len(self), rows):
                part = self[first : first + rows]
                part._read_in_order(out[first : first + rows], scratch)
        else:
            for number in range(len(self)):
                self[number]._read_in_order(out[number, ...], scratch)

    def _read_span(self, out: np.ndarray, scratch: np.ndarray) -> None:
        if self._stored == out.dtype and out.nbytes == len(scratch) and out.flags.c_contiguous:
            self._file.read_into(out.reshape(-1).view(np.uint8), self._start)
            check_finite(out, self._where)
            return
        self._file.read_into(scratch, self._start)
        part = np.ndarray(self.shape, self._stored, scratch, 0, self._strides)
        with np.errstate(over="ignore"):
            part = part.astype(np.float32, copy=False)
        check_finite(part, self._where)
        out[...] = part


class Stack:
    """Arrays of one shape as one array with an axis before theirs, made part by part."""

    dtype = np.dtype(np.float32)

    def __init__(self, arrays: Sequence[Any]):
        self._arrays = arrays
        self.shape: tuple[int, ...] = (len(arrays), *arrays[0].shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, int):
            return np.asarray(self._arrays[first][tuple(rest)])
        parts = [array[tuple(rest)] for array in self._arrays[first]]
        return stack(parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self[:], dtype)


def stack(arrays: list[Any]) -> np.ndarray:
    """Returns arrays of one shape as one, and empties the list so that none is held twice.

    In memory the axes have the order of the first array's file. Copying that is as fast as reading,
    and whoever puts the array on a device may transpose it on the way.
    """
    shape: Sequence[int] = arrays[0].shape
    order = arrays[0].file_order if isinstance(arrays[0], FileArray) else [*range(len(shape))]
    whole = _empty((len(arrays), *(shape[i] for i in order)))
    out = whole.transpose(0, *(1 + order.index(i) for i in range(len(shape))))

    def fill(number: int) -> None:
        array, arrays[number] = arrays[number], None
        if isinstance(array, FileArray):
            array.read_into(out[number, ...])
        else:
            out[number, ...] = array

    with futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(fill, range(len(arrays))):
            pass  # Raises what the thread raised.
    return out


def _empty(shape: Sequence[int]) -> np.ndarray:
    """Returns an array of float32 whose memory is not used before it is written.

    NumPy would ask for large pages, for which the system moves others where memory is fragmented:
    that takes longer than to read the file.
    """
    size = math.prod(shape) * np.dtype(np.float32).itemsize
    if size < LEAST:
        return np.empty(shape, np.float32)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.float32).reshape(shape)


def _reshaped(
    shape: Sequence[int], strides: Sequence[int], wanted: Sequence[int]
) -> list[int] | None:
    """Returns the strides of the same elements in another shape; None if there are none.

    Axes are split and joined in groups of equal size, as NumPy does it. All lengths are positive.
    """
    old = [(n, stride) for n, stride in zip(shape, strides, strict=True) if n > 1]
    out = [0] * len(wanted)
    first, begin = 0, 0
    while first < len(old):
        last, end = first + 1, begin + 1
        held, asked = old[first][0], wanted[begin]
        while held != asked:
            if asked < held:
                asked, end = asked * wanted[end], end + 1
            else:
                held, last = held * old[last][0], last + 1
        for outer, inner in zip(old[first:last], old[first + 1 : last], strict=False):
            if outer[1] != math.prod(inner):
                return None
        stride = old[last - 1][1]
        for place in range(end - 1, begin - 1, -1):
            out[place], stride = stride, stride * wanted[place]
        first, begin = last, end
    return out
