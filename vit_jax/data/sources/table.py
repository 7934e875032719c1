"""Tables that list images with labels: CSV, TSV, JSON lines, Parquet, Hugging Face datasets.

    config.data.source = "table"
    config.data.name = "photos/{split}.csv"

A row has the file of an image, or in Parquet its bytes, and its label. `name` is a file, a pattern
such as `shards/*.parquet`, or the folder of a Hugging Face dataset in Parquet, whose features name
the classes. `{split}` in it is replaced by the split. All may lie on an object store (`gs://`), on
the web (`https://`) or on the Hugging Face hub (`hf://datasets/USER/REPO[/PATH]`).

    config.data.args = {"split_column": "fold"}             # one file with all splits
    config.data.args = {"separator": "|"}                   # several labels in a cell
    config.data.args = {"label": ["cat", "dog"]}            # a column of 0 and 1 for each class
    config.data.args = {"class_names": "classes.txt"}       # the order of the classes

Classes are the distinct labels of the training split (without one, of all splits together), numbers
in their order, other labels sorted.
An example has `image`, `label` (int32, or uint8 ones and zeros `[classes]` if images have several
labels), and `weight` (float32) if a column has it. Mistakes are named by file, row, and column.
"""

import contextlib
import logging
import os
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vit_jax.data import files
from vit_jax.data.images import check_exif, for_decoding
from vit_jax.data.sampling import BlockShuffle
from vit_jax.data.sources import Records, _table_files, _table_names
from vit_jax.data.sources._labels import (
    LabelCells,
    group_numbers,
    read_names,
    sorted_names,
    weights,
)
from vit_jax.data.sources._splits import drawn_and_read, select, split_name
from vit_jax.data.sources._table_files import Table
from vit_jax.errors import UserError
from vit_jax.storage import is_remote

logger = logging.getLogger(__name__)

_IMAGE_COLUMNS = ("image", "img", "path", "file", "file_name", "filename", "filepath")


class Source:
    """Reads the rows of a split.

    Args:
      name: the table or tables; see the top of this file.
      split: the split, and a part of it in brackets, see `_splits`. Parts by number follow the
        order of the rows.
      image: the column of the image; the default is the first of image, img, path, file, file_name,
        filename and filepath that there is.
      label: the column of the label or labels, by default `label` or the only class label of a
        Hugging Face dataset; or a list of columns of 0 and 1, one for each class.
      separator: what stands between several labels in one cell.
      split_column: the column of the split, for files that hold several.
      weight: the column of the weight of each example in the loss.
      group: the column of the group of each image, which folds do not divide.
      images: the folder that files are relative to, by default that of the table.
      class_names: the names of the classes in their order, or a text file with one in each line.
        Labels are then these names, or their numbers from 0 on.
      exif: "apply" turns photographs upright by their EXIF orientation; "ignore" does not.
      split_seed: the seed of folds and of parts of classes.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        image: str = "",
        label: str | Sequence[str] = "",
        separator: str = "",
        split_column: str = "",
        weight: str = "",
        group: str = "",
        images: str = "",
        class_names: str | Sequence[str] = (),
        exif: str = "apply",
        split_seed: int = 0,
    ):
        check_exif(exif)
        part = split_name(split) or "train"
        table = _table_names.open_tables(name, part)
        columns = _label_columns(table, label)
        table.image_folder = self._folder = _folder(images.replace("{split}", part), table)
        table.load(
            table.choose(image, _IMAGE_COLUMNS, "image"),
            [*columns, *(one for one in (split_column, weight, group) if one)],
        )
        rows = _rows_of(table, split_column, part, name)
        cells = LabelCells(table, columns, separator, rows)
        given = read_names(class_names)
        if given and len(columns) > 1:
            raise UserError("config.data.args.class_names: the columns of label name the classes")
        of_file = table.class_names(columns[0]) if len(columns) == 1 else ()
        are_numbers = bool(of_file) and not given
        given = given or of_file or (tuple(columns) if len(columns) > 1 else ())
        training = _Classes(given, cells.are_several)
        if not given:
            training = _training_classes(name, part, cells, split_column)
        self.class_names = training.names
        values = cells.numbers(
            self.class_names,
            are_several=cells.are_several or training.are_several,
            are_given=bool(given),
            are_numbers=are_numbers,
        )
        groups = group_numbers(table, group, rows) if group else None
        firsts = _first_rows(table, rows, self._folder)
        _refuse_contradictions(table, rows, firsts, values, groups)
        chosen = select(split, values, groups, split_seed, firsts=firsts)
        self._table, self._rows, self._labels = table, rows[chosen], values[chosen]
        self._weights = weights(table, weight, self._rows) if weight else None
        self._exif = exif
        self.num_classes = len(self.class_names)
        self.blocks = _blocks(table, self._rows)
        self.fingerprint = f"table:{_base(name)}:{split}:{len(self._rows)}"
        self.fingerprint += drawn_and_read(split_seed, exif)
        table.check_images(self._rows, self._folder)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> np.ndarray:
        """The labels of all records, in their order."""
        return self._labels

    def fetch(self, indices: np.ndarray) -> Records:
        rows = self._rows[indices]
        found = np.empty(len(rows), object)
        for place, data in enumerate(self._table.encoded_images(rows, self._folder)):
            found[place] = for_decoding(data, self._exif)
        records = {"image": found, "label": self._labels[indices]}
        if self._weights is not None:
            records["weight"] = self._weights[indices]
        return records

    def describe(self, index: int) -> str:
        return self._table.describe(int(self._rows[index]), self._folder)


class _Classes(NamedTuple):
    """The classes of a split, and whether an example may have any number of them."""

    names: tuple[str, ...]
    are_several: bool

    @classmethod
    def of(cls, cells: LabelCells) -> "_Classes":
        return cls(sorted_names(cells.labels), cells.are_several)


_read_before: dict[tuple, _Classes] = {}
_MAX_READ_BEFORE = 16


def _first_rows(table: Table, rows: np.ndarray, folder: str) -> np.ndarray:
    """Returns for each row the place, among `rows`, of the first with the same image file, int64.

    A row of its own are images in the table itself, and cells that name no file.
    """
    names = table.image_names()
    root = "" if is_remote(folder) else os.path.join(os.path.abspath(folder), "")
    first: dict[str, int] = {}
    return np.array(
        [
            first.setdefault(_one_spelling(names[row], root), place)
            if names and isinstance(names[row], str)
            else place
            for place, row in enumerate(rows.tolist())
        ],
        np.int64,
    )


def _one_spelling(name: str, root: str) -> str:
    """Returns a name that is equal for all spellings of one file below the folder `root`.

    Objects of a store, for which `root` is "", have one spelling.
    """
    if root and ("./" in name or "//" in name):
        name = os.path.normpath(name)
    name = name.removeprefix(root)
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _refuse_contradictions(
    table: Table,
    rows: np.ndarray,
    firsts: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
) -> None:
    """Raises a `UserError` for the first image file that two rows give different labels or groups.

    Warns of files that are in several rows, all alike.
    """
    again = np.flatnonzero(firsts != np.arange(len(rows)))
    if not len(again):
        return
    for what, values in (("label", labels), ("group", groups)):
        if values is None:
            continue
        differ = (values[again] != values[firsts[again]]).reshape(len(again), -1).any(1)
        if differ.any():
            place = again[differ.argmax()]
            row, earlier = int(rows[place]), int(rows[firsts[place]])
            advice = ", with all its labels in a cell (config.data.args.separator)"
            raise UserError(
                f"{table.image_cell(row)}: {files.shown(table.image_names()[row])} has another"
                f" {what} in {table.image_cell(earlier)}; write one row for an image"
                + (advice if what == "label" else "")
            )
    row, earlier = int(rows[again[0]]), int(rows[firsts[again[0]]])
    logger.warning(
        "%d rows name an image that an earlier row names, first %s and %s; each is an example, and"
        " folds keep them together",
        len(again), table.image_cell(earlier), table.image_cell(row),
    )  # fmt: skip


def _base(name: str) -> str:
    return os.path.basename(os.path.normpath(name))


def _folder(images: str, table: Table) -> str:
    """Returns the folder that the files in a table are relative to."""
    if not images or is_remote(images):
        return images or table.folder
    return str(files.existing_folder(images))


def _label_columns(table: Table, label: str | Sequence[str]) -> list[str]:
    if not isinstance(label, str):
        return [table.choose(one, (), "label") for one in label]
    return [table.choose(label, ("label", *table.class_label_columns()), "label")]


def _rows_of(table: Table, split_column: str, part: str, name: str) -> np.ndarray:
    """Returns the numbers of the rows of a split, int64."""
    if not split_column:
        if part != "train" and not table.is_of_split:
            raise UserError(
                f"{files.shown(name)} has no split {part!r}: write '{{split}}' in its name, or name"
                " the column of the split (config.data.args.split_column); 'train[fold 1 of 10]'"
                " is a part of the whole"
            )
        return np.arange(table.num_rows)
    rows = rows_in_column(table, split_column, part)
    if not len(rows):
        splits = {str(value).strip() for value in table.values(split_column)}
        known = ", ".join(map(files.shown, sorted(splits)[:10]))
        raise UserError(
            f"{files.shown(name)} has no rows of the split {part!r}; its column"
            f" {split_column!r} has {known}"
        )
    return rows


def rows_in_column(table: Table, split_column: str, part: str) -> np.ndarray:
    """Returns the numbers of the rows whose cell names a split, int64; empty if none does."""
    wanted = _table_names.same_split(part)
    of_row = [str(value).strip() for value in table.values(split_column)]
    return np.flatnonzero([one in wanted or one.lower() in wanted for one in of_row])


# Datasets have this number as the label of test images whose label is secret.
_NO_LABEL = "-1"


def _training_classes(name: str, part: str, cells: LabelCells, split_column: str) -> _Classes:
    """Returns the classes of the training split; without one, those of all splits together.

    The files of another split are read once, as long as they stay unchanged.
    """
    if split_column and "train" in _table_names.same_split(part):
        return _Classes.of(cells)
    if split_column:
        rows = rows_in_column(cells.table, split_column, "train")
        rows = rows if len(rows) else np.arange(cells.table.num_rows)
        return _Classes.of(LabelCells(cells.table, cells.columns, cells.separator, rows))
    found: list[_Classes] = []
    names: list[str] = []
    for split, paths in _splits_with_classes(name, part).items():
        is_read = split in _table_names.same_split(part)
        try:
            found.append(_classes_of_split(name, split, paths, cells, is_read=is_read))
        except UserError:
            if is_read or split == "train":
                raise
            continue  # The images of a test set may have no labels.
        names += [one for one in found[-1].names if split == "train" or one != _NO_LABEL]
    return _Classes(sorted_names([tuple(names)]), any(one.are_several for one in found))


def _splits_with_classes(name: str, part: str) -> dict[str, Sequence[str]]:
    """Returns the files of the training split; without one, of `part` and each usual split."""
    found: dict[str, Sequence[str]] = {}
    usual = [names[0] for names in _table_names.SPLIT_NAMES]
    is_usual = any(one in usual for one in _table_names.same_split(part))
    for split in [*usual, *([] if is_usual else [part])]:
        with contextlib.suppress(UserError):  # There is no such split.
            found[split] = _table_names.find_files(name, split)[0]
        if split == "train" and found:
            break
    return found


def _classes_of_split(
    name: str, split: str, paths: Sequence[str], cells: LabelCells, *, is_read: bool
) -> _Classes:
    """Returns the classes of the files of a split. With `is_read`, they are those of `cells`."""
    stamps = _stamps(paths)
    key = (stamps, tuple(cells.columns), cells.separator)
    found = _Classes.of(cells) if is_read else _read_before.get(key)
    if not found:
        table = _table_names.open_tables(name, split)
        table.load("", cells.columns)
        rows = np.arange(table.num_rows)
        found = _Classes.of(LabelCells(table, cells.columns, cells.separator, rows))
    if stamps:
        _read_before[key] = found
        if len(_read_before) > _MAX_READ_BEFORE:
            del _read_before[next(iter(_read_before))]
    return found


def _stamps(paths: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    """Returns what changes with the contents of local files; () if some are not local."""
    if any(map(is_remote, paths)):
        return ()
    try:
        states = [(path, os.stat(path)) for path in paths]
    except OSError:
        return ()
    return tuple((path, state.st_mtime_ns, state.st_size) for path, state in states)


def _blocks(table: Table, rows: np.ndarray) -> BlockShuffle | None:
    """Returns the blocks in which rows are read; None where every row is at hand."""
    if table.image_bytes <= _table_files.KEPT_BYTES:
        return None
    lengths = np.bincount(np.searchsorted(table.block_ends, rows, side="right"))
    return BlockShuffle(tuple(lengths[lengths > 0].tolist()))
