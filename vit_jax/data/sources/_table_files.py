"""The files of tables: rows of text, or columns of Parquet, by one interface."""

import abc
import contextlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.data import files, images
from vit_jax.data.sources import _features, _rows
from vit_jax.errors import UserError, nearest
from vit_jax.storage import is_remote

KEPT_BYTES = 1 << 30
"""The size in bytes up to which the images of Parquet files stay in memory once they are read."""

_KEPT_BLOCKS = 24
_MAX_BLOCK_BYTES = 4 << 30
# A row group stores an image that many of its rows share once, and is as large as all rows in
# memory. Tables of captions repeat an image for each caption.
_ALWAYS_UNFOLDED = 128 << 20
_MAX_RATIO = 200
_ROWS_AT_ONCE = 64
# A few kilobytes of Parquet can stand for billions of equal rows. Rows that name images differ.
_ALWAYS_ROWS = 1 << 20
_MAX_ROWS_A_BYTE = 16


class Table(abc.ABC):
    """Rows with named columns, in one or several files.

    Attributes:
      paths: the files.
      is_of_split: whether the files hold the rows of the wanted split alone.
      columns: the names of the columns; JSON lines have those of the first line.
      num_rows: the number of rows of all files together.
      image_bytes: the size in bytes of images that the files themselves hold.
      block_ends: the number of rows up to the end of each block that is read at once, int64.
      image_folder: the folder that the files of images are relative to; by default `folder`.
    """

    columns: list[str]
    num_rows: int
    image_bytes = 0
    block_ends = np.zeros(0, np.int64)

    def __init__(self, paths: Sequence[str], *, is_of_split: bool):
        self.paths, self.is_of_split = paths, is_of_split
        self.image_folder = self.folder
        self._values: dict[str, list] = {}
        self._image = ""

    @property
    def folder(self) -> str:
        """The folder of the files."""
        return os.path.dirname(self.paths[0]) or "."

    def choose(self, given: str, candidates: Sequence[str], what: str) -> str:
        """Returns the column that was named, or the only or first candidate that there is.

        Raises:
          UserError: there is no such column.
        """
        known = ", ".join(map(files.shown, self.columns)) or "no columns"
        found = [one for one in ([given] if given else candidates) if one in self.columns]
        if found:
            return found[0]
        where = files.shown(self.paths[0])
        if given:
            advice = nearest(given, map(files.shown, self.columns))
            raise UserError(f"{where} has no column {given!r}; {advice}")
        raise UserError(
            f"{where} has {known}; name the column of the {what} (config.data.args.{what})"
        )

    def values(self, column: str) -> list:
        """Returns the values of a loaded column, one for each row."""
        return self._values[column]

    def image_names(self) -> list:
        """Returns the files of images, one for each row; [] where the rows hold the images."""
        return self._values.get(self._image, [])

    def image_cell(self, row: int) -> str:
        """Returns the position of the cell with a row's image, for a message."""
        return self.where(row, self._image)

    def class_label_columns(self) -> list[str]:
        """Returns the column whose classes the file itself names, if there is only one."""
        return []

    def class_names(self, column: str) -> tuple[str, ...]:
        """Returns the names of the classes of a column, if the file itself has them."""
        del column
        return ()

    def encoded_images(self, rows: np.ndarray, folder: str) -> Iterator[bytes]:
        """Yields the encoded image of each row. Raises `OSError` if one cannot be read."""
        for row in rows.tolist():
            yield images.read(self._path(row, folder))

    def describe(self, row: int, folder: str) -> str:
        """Returns the file of an image and its place in the table, or the place alone."""
        return f"{files.shown(self._path(row, folder))} ({self.image_cell(row)})"

    def check_images(self, rows: np.ndarray, folder: str) -> None:
        """Raises a `UserError` for the first row that names no file inside `folder`."""
        for row in rows.tolist():
            self._path(row, folder)

    def _path(self, row: int, folder: str) -> str:
        """Returns the file of a row's image."""
        name = self._values[self._image][row]
        where = self.where(row, self._image)
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: names no file")
        if is_remote(folder):
            if "://" in name or ".." in name.split("/") or name.startswith("/"):
                raise UserError(f"{where}: {files.shown(name)!r} is no path inside {folder}")
            return f"{folder.rstrip('/')}/{name}"
        return os.path.join(folder, files.path_inside(folder, name, where))

    @abc.abstractmethod
    def load(self, image: str, others: Sequence[str]) -> None:
        """Reads the columns that are named; `image` "" reads no images."""

    @abc.abstractmethod
    def where(self, row: int, column: str) -> str:
        """Returns the position of a cell for a message: file, row and column."""


class TextTable(Table):
    """CSV, TSV or JSON-lines files. Only the columns that are wanted stay in memory."""

    def __init__(self, paths: Sequence[str], *, is_of_split: bool):
        super().__init__(paths, is_of_split=is_of_split)
        self._opened = [self._open(path) for path in paths]
        self.columns = self._opened[0][0]
        self._lines: list[tuple[int, str]] = []

    @staticmethod
    def _open(path: str) -> tuple[list[str], Iterator]:
        """Returns the columns of a file, and its rows, which can be read once."""
        text = files.read_text(path)
        if not path.lower().endswith(".jsonl"):
            return _rows.columns_and_cells(path, text)
        rows = _checked_objects(path, text)
        first = next(rows, None)
        return (list(first[1]), itertools.chain([first], rows)) if first else ([], rows)

    def load(self, image: str, others: Sequence[str]) -> None:
        self._image = image
        wanted = list(dict.fromkeys([image, *others] if image else others))
        values: dict[str, list] = {column: [] for column in wanted}
        for number, (path, opened) in enumerate(zip(self.paths, self._opened, strict=True)):
            for where, row in self._rows(path, *opened, wanted):
                self._lines.append((number, where))
                for column, cells in values.items():
                    if column not in row:
                        raise UserError(f"{files.shown(path)}: {where} has no {column!r}")
                    cells.append(row[column])
        self._values, self._opened = values, []
        self.num_rows = len(self._lines)

    def _rows(
        self, path: str, columns: Sequence[str], rows: Iterator, wanted: Sequence[str]
    ) -> Iterator[tuple[str, Mapping]]:
        if path.lower().endswith(".jsonl"):
            return rows
        _rows.check_columns(path, columns, wanted, "name each of them once")
        return _rows.named_cells(path, columns, rows, wanted, self.image_folder)

    def where(self, row: int, column: str) -> str:
        number, line = self._lines[row]
        return f"{files.shown(self.paths[number])}: {line}, column {column!r}"


class ParquetTable(Table):
    """Parquet files. Images that they hold are read by row groups, and kept while they fit."""

    def __init__(self, paths: Sequence[str], *, is_of_split: bool):
        super().__init__(paths, is_of_split=is_of_split)
        opened = [self._open(path) for path in paths]
        self._metadata = [one.metadata for one in opened]
        self._schemas = [one.schema_arrow for one in opened]
        self.columns = list(self._schemas[0].names)
        self._ends = np.cumsum([one.num_rows for one in self._metadata], dtype=np.int64)
        self.num_rows = int(self._ends[-1])
        _check_rows(paths, [one.num_rows for one in self._metadata])
        self._groups = [
            (number, group)
            for number, metadata in enumerate(self._metadata)
            for group in range(metadata.num_row_groups)
        ]
        lengths = [self._metadata[n].row_group(group).num_rows for n, group in self._groups]
        self.block_ends = np.cumsum(lengths, dtype=np.int64)
        self._stored = [(one.metadata or {}).get(_features.KEY, b"") for one in self._schemas]
        self._features = _features.read(paths[0], self._stored[0])
        self._kept: dict[int, list[bytes | str | None]] = {}
        self._lock = threading.Lock()

    def _open(self, path: str, metadata: Any = None, **options: Any) -> Any:
        from pyarrow import parquet

        options |= {"metadata": metadata, "page_checksum_verification": True}
        with _naming(path):
            source = files.open_remote(path) if is_remote(path) else regular(path)
            return parquet.ParquetFile(source, **options)

    def load(self, image: str, others: Sequence[str]) -> None:
        self._image = image
        wanted = list(others)
        kinds = {column: self._kind(column) for column in ([image] if image else []) + wanted}
        if image:
            if kinds[image] not in ("texts", "bytes", "structs"):
                held = self._schemas[0].field(image).type
                raise UserError(
                    f"{files.shown(self.paths[0])}: column {image!r} holds {held}, which is neither"
                    " paths nor bytes of images"
                )
            if kinds[image] == "texts":
                wanted.append(image)
            else:
                self.image_bytes = self._size()
        self._values = {column: [] for column in wanted}
        for path, metadata in zip(self.paths, self._metadata, strict=True):
            with _naming(path):
                # Equal cells are read once, because a small file can stand for many long ones.
                shared = [name for name in self._values if kinds[name] in ("texts", "bytes")]
                opened = self._open(path, metadata, read_dictionary=shared)
                table = opened.read(columns=list(self._values))
                for column, values in self._values.items():
                    values.extend(_python_values(table.column(column)))

    def _kind(self, column: str) -> str:
        """Returns the kind of values of a column: "texts", "bytes", "numbers", "lists", ...

        Raises:
          UserError: a file has no such column, or several, or the files' values differ in kind.
        """
        found: dict[str, str] = {}
        for path, schema in zip(self.paths, self._schemas, strict=True):
            count = schema.names.count(column)
            if count != 1:
                raise UserError(f"{files.shown(path)} has {count or 'no'} columns {column!r}")
            kind = _kind_of(schema.field(column).type)
            if kind:
                found.setdefault(kind, path)
            if len(found) > 1:
                (first, path_of_first), (other, path_of_other) = found.items()
                raise UserError(
                    f"column {column!r} holds {first} in {files.shown(path_of_first)}, but {other}"
                    f" in {files.shown(path_of_other)}; write one kind in all files"
                )
        return next(iter(found), "nothing")

    def _size(self) -> int:
        """Returns the size of all row groups in bytes. Raises `UserError` for a huge one.

        pyarrow also tells the size of each column, but ends the process where that is damaged.
        """
        total = 0
        for number, group in self._groups:
            size = self._metadata[number].row_group(group).total_byte_size
            if size > _MAX_BLOCK_BYTES:
                raise UserError(
                    f"{files.shown(self.paths[number])}: row group {group} has {size:,} bytes of"
                    " images; write the file with smaller ones, such as row_group_size=100"
                )
            total += size
        return total

    def class_label_columns(self) -> list[str]:
        names = {one: _features.label_names(self._features.get(one)) for one in self.columns}
        found = [column for column in self.columns if names[column]]
        return found if len(found) == 1 else []

    def class_names(self, column: str) -> tuple[str, ...]:
        names = _features.label_names(self._features.get(column))
        for stored, path in dict(zip(self._stored, self.paths, strict=True)).items():
            others = _features.label_names(_features.parse(stored).get(column))
            if names and others and others != names:
                raise UserError(
                    f"{files.shown(self.paths[0])} and {files.shown(path)} name other classes of"
                    f" the column {column!r}"
                )
        return names

    def encoded_images(self, rows: np.ndarray, folder: str) -> Iterator[bytes]:
        if self._image in self._values:
            yield from super().encoded_images(rows, folder)
            return
        for row in rows.tolist():
            block, place = placed(self.block_ends, row)
            value = self._block(block)[place]
            if isinstance(value, str):
                inside = files.path_inside(folder, value, self.where(row, self._image))
                value = images.read(os.path.join(folder, inside))
            if not value:
                raise images.BadImage("the row has no image")
            yield value

    def _block(self, block: int) -> list[bytes | str | None]:
        """Returns the images of a row group, or their paths."""
        with self._lock:
            if block in self._kept:
                self._kept[block] = self._kept.pop(block)  # The latest are at the end.
                return self._kept[block]
        values = self._read_block(*self._groups[block])
        with self._lock:
            self._kept[block] = values
            while self.image_bytes > KEPT_BYTES and len(self._kept) > _KEPT_BLOCKS:
                del self._kept[next(iter(self._kept))]
        return values

    def _read_block(self, number: int, group: int) -> list[bytes | str | None]:
        """Reads the images of a row group, some rows at a time.

        Raises:
          UserError: the rows take far more memory than the row group has bytes.
        """
        path, metadata = self.paths[number], self._metadata[number]
        size = max(1, metadata.row_group(group).total_byte_size)
        rows = max(1, min(_ROWS_AT_ONCE, _ALWAYS_UNFOLDED // size))
        values: list[bytes | str | None] = []
        unfolded = 0
        with _naming(path):
            opened = self._open(path, metadata)
            for batch in opened.iter_batches(rows, row_groups=[group], columns=[self._image]):
                column = batch.column(self._image)
                unfolded += column.nbytes
                if unfolded > max(_ALWAYS_UNFOLDED, _MAX_RATIO * size):
                    raise UserError(
                        f"{files.shown(path)}: row group {group} has {size:,} bytes that stand for"
                        f" more than {unfolded:,} bytes of images; write each image once"
                    )
                values += map(_image_or_path, column.to_pylist())
        if unfolded < 2 * size:
            return values
        known: dict[Any, Any] = {}  # Rows with equal images share one in memory, as in the file.
        return [known.setdefault(value, value) for value in values]

    def describe(self, row: int, folder: str) -> str:
        if self._image in self._values:
            return super().describe(row, folder)
        return self.where(row, self._image)

    def check_images(self, rows: np.ndarray, folder: str) -> None:
        if self._image in self._values:
            super().check_images(rows, folder)

    def where(self, row: int, column: str) -> str:
        number, place = placed(self._ends, row)
        return f"{files.shown(self.paths[number])}: row {place}, column {column!r}"


def _kind_of(held: Any) -> str:
    """Returns what values of an Arrow type are; "" for a column without values."""
    from pyarrow import types

    if types.is_dictionary(held):
        held = held.value_type
    kinds = {
        "texts": (types.is_string, types.is_large_string),
        "bytes": (types.is_binary, types.is_large_binary),
        "numbers": (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal),
        "lists": (types.is_list, types.is_large_list, types.is_fixed_size_list),
        "structs": (types.is_struct,),
        "": (types.is_null,),
    }
    found = [kind for kind, checks in kinds.items() if any(check(held) for check in checks)]
    return found[0] if found else str(held)


def _image_or_path(value: Any) -> bytes | str | None:
    """Returns what a cell with an image holds; `value` may be a structure of both."""
    return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value


def _python_values(column: Any) -> list:
    """Returns the values of an Arrow column. Rows with one entry of a dictionary share a value."""
    from pyarrow import types

    values: list = []
    for chunk in column.chunks:
        if types.is_dictionary(chunk.type):
            entries = chunk.dictionary.to_pylist()
            numbers = chunk.indices.to_pylist()
            values += [None if number is None else entries[number] for number in numbers]
        else:
            values += chunk.to_pylist()
    return values


def _check_rows(paths: Sequence[str], counts: Sequence[int]) -> None:
    """Raises a `UserError` for a file that is too small for the number of its rows."""
    for path, count in zip(paths, counts, strict=True):
        if count > _ALWAYS_ROWS and not is_remote(path):
            size = os.path.getsize(path)
            if count > _MAX_ROWS_A_BYTE * size:
                raise UserError(
                    f"{files.shown(path)}: {size:,} bytes that stand for {count:,} rows: no rows"
                    " with an image each are compressed so well"
                )


def _checked_objects(path: str, text: str) -> Iterator[tuple[str, Mapping]]:
    """Yields the position and the object of each line of a JSON-lines file."""
    for where, row in _rows.json_lines(path, text):
        if not isinstance(row, dict):
            raise UserError(f"{files.shown(path)}: {where} is no object {{...}}")
        yield where, row


def placed(ends: np.ndarray, row: int) -> tuple[int, int]:
    """Returns the number of the part that holds a row, and the row's number within that part.

    ends: the number of rows up to the end of each part.
    """
    number = int(np.searchsorted(ends, row, side="right"))
    return number, row - (int(ends[number - 1]) if number else 0)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Converts errors about a Parquet file to a `UserError` that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{files.shown(path)}: {files.reason(error)}") from error


def regular(path: str) -> str:
    """Returns a path, unless it is a pipe, a device, or a folder."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("not a regular file")
    return path
