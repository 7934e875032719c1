"""Tar files of WebDataset as a table: one row for each sample, through an index."""

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vit_jax.data import files, images
from vit_jax.data.sources import _tar_index
from vit_jax.data.sources._table_files import Table, placed, regular
from vit_jax.errors import UserError
from vit_jax.storage import is_remote

_MAX_OPEN = 64


class TarTable(Table):
    """Tar files whose members `KEY.jpg`, `KEY.cls`, `KEY.json` form the sample KEY.

    Columns are `image`, `cls`, and the keys of the first sample's JSON.
    """

    def __init__(self, paths: Sequence[str], *, is_of_split: bool):
        super().__init__(paths, is_of_split=is_of_split)
        self._indices = [_tar_index.of(path) for path in paths]
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
            if not size:
                raise images.BadImage("the file is empty")
            if len(data) < size:
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
            with _tar_index.open_tar(path) as file:
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
