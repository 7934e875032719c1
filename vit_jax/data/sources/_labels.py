"""The labels, weights and groups in the cells of tables."""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.data import files
from vit_jax.data.sources._table_files import Table
from vit_jax.errors import UserError, nearest

_YES, _NO = ("1", "true", "yes"), ("0", "false", "no", "")


def read_names(class_names: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the names of classes from a list, or from a text file with one in each line."""
    if isinstance(class_names, str):
        class_names = files.lines(files.read_text(files.expand(class_names)))
    names = tuple(_plain(str(name)) for name in class_names)
    for name, count in Counter(names).items():
        if not name or count > 1:
            raise UserError(
                f"config.data.args.class_names has {'an empty name' if not name else 'two classes'}"
                f" {name!r}"
            )
    return names


def sorted_names(labels: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the distinct labels of examples: numbers in their order, other texts sorted."""
    distinct = {one for labels_of_row in labels for one in labels_of_row}
    if all(one.isascii() and one.isdecimal() for one in distinct):
        return tuple(sorted(distinct, key=_by_number))
    return tuple(sorted(distinct))


def _by_number(text: str) -> tuple[int, str, str]:
    """Sorts decimal numbers of any length, which `int` would refuse beyond 4,300 digits."""
    digits = text.lstrip("0")
    return len(digits), digits, text


class LabelCells:
    """The labels of some rows of a table, as texts.

    Args:
      table, rows: the table, and the numbers of the rows.
      columns: the column of labels, or columns of 0 and 1, each for the class of its name.
      separator: what stands between several labels in one cell.

    Attributes:
      table, columns, separator: the arguments.
      labels: the labels of each row.
      are_several: whether a row may have any number of labels; it has one otherwise.

    Raises:
      UserError: a cell has no label, or something that is none.
    """

    def __init__(self, table: Table, columns: Sequence[str], separator: str, rows: np.ndarray):
        self.table, self.columns, self.separator, self._rows = table, columns, separator, rows
        cells = [table.values(column) for column in columns]
        lists = any(isinstance(cells[0][row], list | tuple) for row in rows.tolist())
        self.are_several = len(columns) > 1 or bool(separator) or lists
        if len(columns) > 1:
            self.labels = [self._of_columns(cells, row) for row in rows.tolist()]
            return
        self.labels = []
        for row in rows.tolist():
            value = cells[0][row]
            if isinstance(value, str) and separator:
                value = [one for one in value.split(separator) if one.strip()]
            elif self.are_several and value is None:
                value = []
            several = value if isinstance(value, list | tuple) else [value]
            self.labels.append(tuple(self._key(one, row) for one in several))

    def numbers(
        self,
        names: Sequence[str],
        *,
        are_several: bool,
        are_given: bool,
        are_numbers: bool = False,
    ) -> np.ndarray:
        """Returns class numbers int32 `[n]`, or uint8 ones and zeros `[n, classes]`.

        Args:
          names: the classes in the order of their numbers.
          are_given: whether the names were not found in the data; labels may then be numbers.
          are_numbers: whether they are numbers for sure, even if a class is called like a number.
        """
        known = {name: number for number, name in enumerate(names)}
        is_named = any(one in known for labels in self.labels for one in labels)
        if are_numbers or (are_given and not is_named):
            known = {str(number): number for number in range(len(names))}
        found = np.zeros((len(self.labels), len(names)) if are_several else len(self.labels), int)
        for place, labels in enumerate(self.labels):
            for one in labels:
                if one not in known:
                    raise UserError(f"{self._where(place)}: {self._unknown(one, known, are_given)}")
                if are_several:
                    found[place, known[one]] = 1
                else:
                    found[place] = known[one]
        return found.astype(np.uint8 if are_several else np.int32)

    @staticmethod
    def _unknown(label: str, known: dict[str, int], are_given: bool) -> str:
        of = "config.data.args.class_names" if are_given else "the training split"
        return (
            f"{files.shown(label)!r} is no class of {of}; {nearest(label, map(files.shown, known))}"
        )

    def _where(self, place: int) -> str:
        return self.table.where(int(self._rows[place]), self.columns[0])

    def _of_columns(self, cells: Sequence[list], row: int) -> tuple[str, ...]:
        """Returns the names of the columns whose cell says yes."""
        found = []
        for column, values in zip(self.columns, cells, strict=True):
            text = _text(values[row]).lower()
            if text in _YES:
                found.append(column)
            elif text not in _NO:
                where = self.table.where(row, column)
                raise UserError(f"{where}: {files.shown(text)!r} is neither 0 nor 1")
        return tuple(found)

    def _key(self, value: Any, row: int) -> str:
        text = _text(value)
        if not text or "\n" in text or "\r" in text:
            wrong = "a label of several lines; is a quote mark left open?" if text else "no label"
            raise UserError(f"{self.table.where(row, self.columns[0])}: has {wrong}")
        return text


def _text(value: Any) -> str:
    """Returns a label as text; "" if there is none. The whole number 3.0 is 3."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return _plain(str(value))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def weights(table: Table, column: str, rows: np.ndarray) -> np.ndarray:
    """Returns the weights of rows, float32 `[n]`. Raises `UserError` for what is no weight."""
    cells = table.values(column)
    found = np.empty(len(rows), np.float32)
    for place, row in enumerate(rows.tolist()):
        try:
            found[place] = float(cells[row])
        except (TypeError, ValueError):
            found[place] = np.nan
        if not (np.isfinite(found[place]) and found[place] >= 0):
            value = files.shown(str(cells[row]))
            raise UserError(f"{table.where(row, column)}: {value!r} is no weight from 0 on")
    return found


def group_numbers(table: Table, column: str, rows: np.ndarray) -> np.ndarray:
    """Returns the number of the group of each row, int64. Raises `UserError` for empty cells."""
    cells = table.values(column)
    names = [_text(cells[row]) for row in rows.tolist()]
    if "" in names:
        raise UserError(f"{table.where(int(rows[names.index('')]), column)}: names no group")
    return np.unique(names, return_inverse=True)[1]
