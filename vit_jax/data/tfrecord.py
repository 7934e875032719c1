"""Random access to TFDS datasets that were prepared as TFRecord.

A TFRecord file is a sequence of (length, checksum, data, checksum), designed for sequential reads.
One pass over the lengths gives the position of every record. On a local disk, this pass happens
when a file is first used. It reads one page per record, and the positions are kept in memory, eight
bytes per example. From an object store, files are fetched whole and the last few are kept in
memory; `blocks` then describes a suitable order of the records. The checksum of each record is
compared when the record is first read.
"""

import collections
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, BinaryIO

import numpy as np

from vit_jax.data.crc32c import masked_crc32c
from vit_jax.data.image_headers import BadImage
from vit_jax.data.sampling import BlockShuffle
from vit_jax.errors import UserError

_LENGTH = struct.Struct("<Q")
_BEFORE = 12  # The bytes of the length and its checksum.
_AFTER = 4  # The bytes of the checksum of the data.


class TfrecordReader:
    """Reads the examples of a TFDS split by number, in the order in which they were written."""

    def __init__(
        self,
        shards: Sequence[Any],
        parse: Callable[[bytes], dict],
        *,
        remote: bool,
    ):
        """Stores the arguments; files are opened later.

        Args:
            shards: TFDS's file instructions of the split: `filename`, `skip`, `take` and
                `examples_in_shard`.
            parse: converts the bytes of a record to its features.
            remote: if true, files are fetched whole.
        """
        self._shards = shards
        self._parse = parse
        # The number of the first example after each shard.
        self._ends = np.cumsum([shard.take for shard in shards])
        self.blocks: BlockShuffle | None = None
        self._files: _RemoteFiles | _LocalFiles = _LocalFiles(shards)
        if remote:
            self.blocks = BlockShuffle(tuple(shard.take for shard in shards))
            self._files = _RemoteFiles(shards, self.blocks)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        numbers = np.searchsorted(self._ends, indices, side="right").tolist()
        files = self._files.open(set(numbers))
        examples = []
        for number, index in zip(numbers, indices, strict=True):
            shard = self._shards[number]
            within = index - (self._ends[number] - shard.take) + shard.skip
            examples.append(self._parse(files[number](within)))
        return examples


class _LocalFiles:
    """Reads single records from local files, and keeps only their positions in memory."""

    def __init__(self, shards: Sequence[Any]):
        self._shards = shards
        self._places: dict[int, np.ndarray] = {}
        self._sound: dict[int, np.ndarray] = {}

    def open(self, numbers: Iterable[int]) -> dict[int, Callable[[int], bytes]]:
        """Returns, for each shard, a function from the number of a record in it to its bytes."""
        return {number: self._opened(number) for number in numbers}

    def _opened(self, number: int) -> Callable[[int], bytes]:
        shard = self._shards[number]
        path = shard.filename
        places = self._places.get(number)
        if places is None:  # Two threads may both index a file; their results are equal.
            try:
                with open(path, "rb") as file:
                    places = self._places[number] = record_places(_mapped(file), shard)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error

        sound = self._sound.setdefault(number, np.zeros(len(places), bool))

        def read(record: int) -> bytes:
            begin, end = places[record].tolist()
            with open(path, "rb") as file:
                file.seek(begin)
                data = file.read(end - begin + _AFTER)
            return _checked(data, path, record, sound)

        return read


def _mapped(file: BinaryIO) -> bytes | mmap.mmap:
    """Returns the contents of a file as mapped memory, of which only accessed pages are read."""
    if not os.fstat(file.fileno()).st_size:  # An empty file cannot be mapped.
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class _RemoteFiles:
    """Fetches whole files, several at once, and keeps as many as the order of `blocks` needs."""

    def __init__(self, shards: Sequence[Any], blocks: BlockShuffle):
        self._shards = shards
        self._capacity = blocks.groups * (blocks.window + 2)
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[int, Future] = collections.OrderedDict()

    def open(self, numbers: Iterable[int]) -> dict[int, Callable[[int], bytes]]:
        """Returns the same as `_LocalFiles.open`, after all these files were fetched."""
        with self._lock:
            futures = {number: self._wanted(number) for number in numbers}
            while len(self._kept) > max(self._capacity, len(futures)):
                self._kept.popitem(last=False)
        return {number: future.result() for number, future in futures.items()}

    def _wanted(self, number: int) -> Future:
        future = self._kept.get(number)
        if future is None or (future.done() and future.exception()):  # Retry a failed fetch.
            future = self._kept[number] = Future()
            # A daemon thread does not keep a finished process alive if its transfer hangs.
            threading.Thread(target=self._fetch, args=(number, future), daemon=True).start()
        self._kept.move_to_end(number)
        return future

    def _fetch(self, number: int, future: Future) -> None:
        from vit_jax.data.host_tensorflow import tf

        shard = self._shards[number]
        try:
            with tf.io.gfile.GFile(shard.filename, "rb") as file:
                data = file.read()
            places = record_places(data, shard)
        except tf.errors.OpError as error:
            # This is not a bad image, which could be skipped: the store or the network failed.
            future.set_exception(UserError(f"cannot read {shard.filename}: {error.message}"))
        except Exception as error:
            future.set_exception(error)
        else:
            sound = np.zeros(len(places), bool)

            def read(record: int) -> bytes:
                begin, end = places[record].tolist()
                return _checked(data[begin : end + _AFTER], shard.filename, record, sound)

            future.set_result(read)


def _checked(data: bytes, path: str, record: int, sound: np.ndarray) -> bytes:
    """Returns the content of a record, without the checksum that follows it.

    sound: the records whose checksums agreed before, bool `[n]`, to which this one is added.

    Raises:
      BadImage: the checksum is that of another content.
    """
    content = data[:-_AFTER]
    if not sound[record]:
        if masked_crc32c(content) != int.from_bytes(data[-_AFTER:], "little"):
            raise BadImage(f"record {record} of {path} does not have its checksum")
        sound[record] = True
    return content


def record_places(data: bytes | mmap.mmap, shard: Any) -> np.ndarray:
    """Returns the start and end of the data of each record in a file: int64 `[n, 2]`.

    Raises:
        UserError: the file is incomplete.
    """
    places = []
    at = 0
    while at + _BEFORE <= len(data):
        begin = at + _BEFORE
        end = begin + _LENGTH.unpack_from(data, at)[0]
        at = end + _AFTER
        if at > len(data):
            break
        places.append((begin, end))
    if at != len(data) or len(places) != shard.examples_in_shard:
        raise UserError(
            f"{shard.filename} is damaged: {len(places)} of {shard.examples_in_shard} records are "
            "whole; fetch or prepare it again"
        )
    return np.array(places, np.int64).reshape(-1, 2)


def checked_records(path: str) -> Iterator[bytes]:
    """Yields the records of a local or remote file in order, and compares all checksums.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    from vit_jax.data.host_tensorflow import tf

    whole = 0
    try:
        for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
            yield record
            whole += 1
    except tf.errors.DataLossError as error:
        raise UserError(
            f"{path} is damaged after {whole} records; fetch or prepare it again"
        ) from error
    except tf.errors.OpError as error:
        raise UserError(f"cannot read {path}: {error.message}") from error
