"""The rows of text files: CSV, TSV, and JSON lines.

In a `.csv` file, a cell with commas, line breaks, or quote marks is enclosed in quote marks, and
quote marks inside it are doubled. In a `.tsv` file, quote marks are ordinary characters.
"""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence

from vit_jax.data import files
from vit_jax.data.images import is_image_name
from vit_jax.errors import UserError
from vit_jax.storage import is_remote

_ADVICE = "write a cell with quote marks in quote marks, and each quote mark inside it twice"

Cells = Iterator[tuple[int, list[str]]]
"""The line in which each row begins, and the cells of the row."""


def json_lines(path: str | os.PathLike, text: str) -> Iterator[tuple[str, dict]]:
    """Yields the position and the value of each line of a JSON-lines file."""
    for number, line in files.numbered_lines(text):
        yield f"line {number}", files.parse_json(path, line, f": line {number}")


def columns_and_cells(path: str | os.PathLike, text: str) -> tuple[list[str], Cells]:
    """Returns the names of the columns of a CSV or TSV file, and its other rows."""
    is_csv = os.fspath(path).lower().endswith(".csv")
    cells = _comma_rows(path, text) if is_csv else _tab_rows(text)
    return [cell.strip() for cell in next(cells, (1, []))[1]], cells


def check_columns(
    path: str | os.PathLike, columns: Sequence[str], wanted: Iterable[str], advice: str
) -> None:
    """Raises a `UserError` unless the first line of a file names each wanted column once."""
    for key in wanted:
        if columns.count(key) != 1:
            raise UserError(
                f"{files.shown(path)}: line 1 names {columns.count(key) or 'no'} columns {key!r}, "
                f"but {', '.join(map(files.shown, columns)) or 'nothing'}; {advice}"
            )


def named_cells(
    path: str | os.PathLike,
    columns: Sequence[str],
    rows: Cells,
    wanted: Sequence[str],
    folder: str | os.PathLike,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the position of each row, and its cells under the names of their columns.

    Args:
      wanted: the columns that are read, first that of the image.
      folder: the folder that the files of images are relative to.

    Raises:
      UserError: a row has too many cells, so that one would lose a part, or ends before a wanted
        column, or a cell contains the next rows, because a quote mark is left open.
    """
    at, least = columns.index(wanted[0]), 1 + max(map(columns.index, wanted))
    for number, cells in rows:
        if len(cells) > len(columns) and any(cell.strip() for cell in cells[len(columns) :]):
            raise UserError(
                f"{files.shown(path)}: line {number} has {len(cells)} cells, line 1 has"
                f" {len(columns)}: write a cell that has the separator in it in quote marks"
            )
        if len(cells) < least:
            raise UserError(
                f"{files.shown(path)}: line {number} has no {columns[least - 1]!r}, because it has"
                f" {len(cells)} cells, and line 1 {len(columns)}: is it cut short?"
            )
        inner = (line.split(",") for cell in cells for line in files.lines(cell)[1:])
        if any(len(one) >= len(columns) and _is_image(one[at], folder) for one in inner):
            raise UserError(
                f"{files.shown(path)}: a cell of line {number} has the next rows in it, because a"
                f" quote mark is left open: {_ADVICE}"
            )
        yield f"line {number}", dict(zip(columns, cells, strict=False))


def _is_image(cell: str, folder: str | os.PathLike) -> bool:
    """Returns whether a part of a cell names an image, by its suffix or because there is a file."""
    name = cell.strip(' "')
    return is_image_name(name) or (
        bool(name) and not is_remote(folder) and os.path.isfile(os.path.join(folder, name))
    )


def _tab_rows(text: str) -> Cells:
    return ((number, line.split("\t")) for number, line in files.numbered_lines(text))


def _comma_rows(path: str | os.PathLike, text: str) -> Cells:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    while True:
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise UserError(
                f"{files.shown(path)}: the row that begins in line {line} is no row of a table"
                f" ({error}); if a quote mark is left open, {_ADVICE}"
            ) from error
        if cells is None:
            return
        if cells:
            yield line, cells
        line = rows.line_num + 1
