"""Tar files of WebDataset as a table: one row for each sample, through an index built once."""

import io
import json
import logging
import math
import os
import tarfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax import storage
from vit_jax.data import files, images
from vit_jax.data.sources._table_files import Table, placed, regular
from vit_jax.data.sources.npz import check_sizes
from vit_jax.errors import UserError
from vit_jax.storage import is_remote

_INDEX_SUFFIX = ".vit_jax_index.npz"
_MAX_TEXT = 1 << 20
_BUFFER = 1 << 20
_MAX_OPEN = 64
_VERSION = 2
"""The version of the index, which is made anew where the one beside a tar file has another."""

logger = logging.getLogger(__name__)


class _Index(NamedTuple):
    """The samples of one tar file, in the order of the file.

    key: the names of the samples, without suffix. offset, size: where the image lies, in bytes.
    cls, json: the content of the members with these suffixes; "" where there is none. They are
      lists, because an array of texts would take as much for each one as for the longest.
    """

    key: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    cls: Sequence[str]
    json: Sequence[str]


_EMPTY: Mapping[str, Any] = {"cls": "", "json": "", "size": 0, "offset": 0, "dots": math.inf}
_ARRAYS, _TEXTS = _Index._fields[:3], _Index._fields[3:]


class TarTable(Table):
    """Tar files whose members `KEY.jpg`, `KEY.cls`, `KEY.json` form the sample KEY.

    Columns are `image`, `cls`, and the keys of the first sample's JSON. The index of a tar file is
    kept beside it, where that is possible, and made anew when the file has changed.
    """

    def __init__(self, paths: Sequence[str], *, is_of_split: bool):
        super().__init__(paths, is_of_split=is_of_split)
        self._indices = [_index_of(path) for path in paths]
        self._shards = _OpenShards()
        self._ends = np.cumsum([len(index.key) for index in self._indices])
        self.num_rows = int(self._ends[-1])
        first = self._json(0) if self.num_rows else {}
        self.columns = ["image", "cls", *(key for key in first if key not in ("image", "cls"))]

    def _json(self, row: int) -> dict[str, Any]:
        number, place = self._place(row)
        text = str(self._indices[number].json[place])
        found = files.parse_json(self.paths[number], text, f": {self._name(row)}") if text else {}
        return found if isinstance(found, dict) else {}

    def _place(self, row: int) -> tuple[int, int]:
        """Returns the number of the file of a row, and the number of the sample in it."""
        return placed(self._ends, row)

    def _name(self, row: int) -> str:
        number, place = self._place(row)
        return files.shown(str(self._indices[number].key[place]))

    def choose(self, given: str, candidates: Sequence[str], what: str) -> str:
        return super().choose(given, (*candidates, "cls") if what == "label" else candidates, what)

    def load(self, image: str, others: Sequence[str]) -> None:
        if image not in ("", "image"):
            raise UserError(f"config.data.args.image={image!r}: images of tar files are 'image'")
        wanted = [column for column in others if column != "cls"]
        rows = [self._json(row) if wanted else {} for row in range(self.num_rows)]
        for number, row in enumerate(rows):
            lacking = [column for column in wanted if column not in row]
            if lacking:
                raise UserError(f"{self.where(number, lacking[0])}: is not in the sample's JSON")
        self._values = {column: [row[column] for row in rows] for column in wanted}
        if "cls" in others:
            self._values["cls"] = [str(one) for index in self._indices for one in index.cls]
        self._indices = [index._replace(cls=(), json=()) for index in self._indices]

    def encoded_images(self, rows: np.ndarray, folder: str) -> Iterator[bytes]:
        for row in rows.tolist():
            number, place = self._place(row)
            index = self._indices[number]
            size = int(index.size[place])
            if size > images.MAX_BYTES:
                raise images.BadImage(f"{size:,} bytes, more than the {images.MAX_BYTES:,} read")
            data = self._shards.read(self.paths[number], int(index.offset[place]), size)
            if len(data) < size or not size:
                raise images.BadImage("the tar file ends within the image")
            yield data

    def describe(self, row: int, folder: str) -> str:
        return f"{files.shown(self.paths[self._place(row)[0]])}: {self._name(row)}"

    def check_images(self, rows: np.ndarray, folder: str) -> None:
        pass

    def where(self, row: int, column: str) -> str:
        return f"{self.describe(row, '')}, column {column!r}"


class _OpenShards:
    """Tar files that stay open for reading, at most `_MAX_OPEN` of them: those used last.

    Several threads may read at once. A file that is crowded out is closed when none reads it.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Shard] = {}
        self._lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset` on, or fewer where the file ends."""
        if is_remote(path):
            with _open(path) as file:
                file.seek(offset)
                return file.read(size)
        with self._lock:
            shard = self._open.pop(path, None) or _Shard(path)
            self._open[path] = shard  # The latest are at the end.
            if len(self._open) > _MAX_OPEN:
                del self._open[next(iter(self._open))]
        return shard.read(offset, size)


class _Shard:
    """An open local file, closed with the last reference to it."""

    def __init__(self, path: str):
        self._file = os.open(regular(path), os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def read(self, offset: int, size: int) -> bytes:
        found = b""
        while len(found) < size and (
            more := os.pread(self._file, size - len(found), offset + len(found))
        ):
            found += more
        return found


def _open(path: str, buffer: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    opened = files.open_remote(path) if is_remote(path) else io.FileIO(regular(path))
    return io.BufferedReader(opened, buffer)


def _index_of(path: str) -> _Index:
    """Returns the index of a tar file: the one beside it, or a new one, which is written there."""
    try:
        with _open(path, _BUFFER) as file:
            size = file.seek(0, os.SEEK_END)
            changed = 0 if is_remote(path) else os.stat(path).st_mtime_ns
            stamp = np.array([size, changed, _VERSION], np.int64)
            stored = _stored(path, stamp)
            if stored:
                return stored
            file.seek(0)
            index = _built(path, file)
    except OSError as error:
        raise UserError(f"{files.shown(path)}: {files.reason(error)}") from error
    arrays, buffer = index._asdict(), io.BytesIO()
    texts = json.dumps({name: arrays.pop(name) for name in _TEXTS}).encode()
    np.savez(buffer, stamp=stamp, texts=np.frombuffer(texts, np.uint8), **arrays)
    try:
        storage.write_atomically(path + _INDEX_SUFFIX, buffer.getvalue())
    except storage.errors() as error:
        logger.info("%s: its index is not kept: %s", files.shown(path), files.reason(error))
    return index


def _stored(path: str, stamp: np.ndarray) -> _Index | None:
    """Returns the index beside a tar file, if it is whole and of this very file."""
    try:
        data = files.read_bytes(path + _INDEX_SUFFIX, images.MAX_BYTES)
        check_sizes(io.BytesIO(data), len(data))
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            if not np.array_equal(arrays["stamp"], stamp):
                return None
            texts = json.loads(arrays["texts"].tobytes())
            found = _Index(*(arrays[name] for name in _ARRAYS), *(texts[name] for name in _TEXTS))
        return found if len(set(map(len, found))) == 1 else None
    except Exception:  # Whatever is wrong with it, an index can be made anew.
        return None


def _built(path: str, file: io.BufferedReader) -> _Index:
    """Reads the members of a tar file. Members of a sample follow each other.

    Raises:
      OSError: the file is damaged, has no images, or has a member or a sample twice, of which one
        would get the image or the label of the other.
    """
    samples: list[dict[str, Any]] = []
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, suffix = name.partition(".")
                if not member.isreg() or files.is_hidden(name):
                    continue
                key = os.path.join(folder, stem)
                if not samples or samples[-1]["key"] != key:
                    if key in seen:
                        raise OSError(f"two samples are called {files.shown(key)!r}")
                    seen.add(key)
                    samples.append({**_EMPTY, "key": key})
                    members: set[str] = set()
                if suffix in members:
                    raise OSError(f"two members are called {files.shown(member.name)!r}")
                members.add(suffix)
                if suffix in ("cls", "json") and member.size <= _MAX_TEXT:
                    stored = tar.extractfile(member)
                    assert stored is not None
                    content = stored.read()
                    samples[-1][suffix] = content.decode(errors="replace").strip("\ufeff \r\n\t")
                elif images.is_image_name(name) and suffix.count(".") < samples[-1]["dots"]:
                    # KEY.jpg is the image, also where KEY.mask.png stands before it.
                    place = {"offset": member.offset_data, "size": member.size}
                    samples[-1] |= {**place, "dots": suffix.count(".")}
                tar.members = []  # type: ignore[attr-defined]  # They would stay in memory.
    except OSError:
        raise
    except Exception as error:  # `tarfile` raises errors of any type for damaged headers.
        raise OSError(f"no tar file, or a damaged one ({files.reason(error)})") from error
    samples = [sample for sample in samples if sample["size"]]
    if not samples:
        raise OSError("no samples with images in it")
    columns: list[Any] = [[one[name] for one in samples] for name in _Index._fields]
    arrays: list[Any] = [np.array(column) for column in columns[: len(_ARRAYS)]]
    return _Index(*arrays, *columns[len(_ARRAYS) :])
