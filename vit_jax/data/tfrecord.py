"""Random access to TFDS datasets that were prepared as TFRecord, on a local disk.

A TFRecord file is a chain of (length, checksum, data, checksum), made to be read from the front.
Walking the lengths once gives the place of every record; a file is walked when it is first touched,
which reads one page a record, and the places are kept: eight bytes an example.
"""

import mmap
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vit_jax.errors import UserError

_LENGTH = struct.Struct("<Q")
_BEFORE = 12  # Length and its checksum.
_AFTER = 4  # Checksum of the data.


class TfrecordReader:
    """The examples of a TFDS split, by number, in the order in which they were written."""

    def __init__(self, shards: Sequence[Any], parse: Callable[[bytes], dict]):
        """Opens nothing yet.

        Args:
            shards: TFDS's file instructions of the split: `filename`, `skip`, `take` and
                `examples_in_shard`.
            parse: from the bytes of a record to its features.
        """
        for shard in shards:
            if "://" in str(shard.filename):
                raise UserError(
                    f"{shard.filename}: TFRecord files are read at random on local disks only; "
                    "copy the dataset there, or prepare it as array_record"
                )
        self._shards = shards
        self._parse = parse
        self._ends = np.cumsum([shard.take for shard in shards])
        self._places: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        return [self._parse(self._read(index)) for index in indices]

    def _read(self, index: int) -> bytes:
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        within = index - (self._ends[number] - shard.take) + shard.skip
        begin, end = self._shard_places(number)[within]
        with open(shard.filename, "rb") as file:
            file.seek(int(begin))
            return file.read(int(end - begin))

    def _shard_places(self, number: int) -> np.ndarray:
        with self._lock:
            places = self._places.get(number)
        if places is None:
            shard = self._shards[number]
            places = record_places(shard.filename)
            if len(places) != shard.examples_in_shard:
                raise UserError(
                    f"{shard.filename} has {len(places)} records instead of the "
                    f"{shard.examples_in_shard} that were prepared: fetch or prepare it again"
                )
            with self._lock:
                self._places[number] = places
        return places


def record_places(path: str) -> np.ndarray:
    """Where the data of each record begins and ends: int64 `[n, 2]`."""
    places = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0
        while at + _BEFORE <= len(data):
            begin = at + _BEFORE
            end = begin + _LENGTH.unpack_from(data, at)[0]
            at = end + _AFTER
            if at > len(data):
                break
            places.append((begin, end))
        if at != len(data):
            raise UserError(f"{path} is cut off or damaged after {len(places)} records")
    return np.array(places, np.int64).reshape(-1, 2)
