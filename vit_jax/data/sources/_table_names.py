"""Finds the files that the name of a table stands for: a file, a pattern, or a dataset's folder."""

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping

from vit_jax.checkpoints import hub
from vit_jax.data import files
from vit_jax.data.sources._table_files import ParquetTable, Table, TextTable
from vit_jax.data.sources._tar_table import TarTable
from vit_jax.errors import UserError
from vit_jax.storage import is_remote

SPLIT_NAMES = (
    ("train", "training"),
    ("validation", "val", "valid", "dev"),
    ("test", "testing"),
)
"""The names of each split that mean the same."""

_KINDS: Mapping[str, Callable[..., Table]] = {
    ".csv": TextTable,
    ".tsv": TextTable,
    ".jsonl": TextTable,
    ".parquet": ParquetTable,
    ".tar": TarTable,
}
SUFFIXES = tuple(_KINDS)
"""The endings of the files of tables."""

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MAX_FILES = 1_000_000
_SHARD = re.compile(r"(?P<split>.+?)(?:-\d+-of-\d+(?:-[0-9a-f]+)?)?\.parquet")


def same_split(part: str) -> tuple[str, ...]:
    """Returns the names that mean the same split as `part`, itself first."""
    same = next((names for names in SPLIT_NAMES if part.lower() in names), ())
    return (part, *(name for name in same if name != part))


def open_tables(name: str, part: str) -> Table:
    """Opens the table or tables that `name` stands for, of the split `part`.

    Raises:
      UserError: there is none, or one of another kind.
    """
    paths, is_of_split = find_files(name, part)
    suffixes = {os.path.splitext(path)[1].lower() for path in paths}
    if len(suffixes) != 1 or not suffixes <= set(_KINDS):
        raise UserError(
            f"{files.shown(name)}: write a table that ends in {', '.join(_KINDS)}, or the folder of"
            " a dataset in Parquet"
        )
    return _KINDS[suffixes.pop()](paths, is_of_split=is_of_split)


def find_files(name: str, part: str) -> tuple[list[str], bool]:
    """Returns the files of a split, and whether they hold that split alone."""
    if name.startswith(hub.DATASETS):
        name = hub.dataset_path(name)
    if not is_remote(name):
        name = str(files.expand(name))
    if _is_folder(name):
        return _in_folder(name.rstrip("/") or "/", part), True
    if "{split}" not in name:
        return _matching(name), False
    for written in same_split(part):
        with contextlib.suppress(UserError):
            return _matching(name.replace("{split}", written)), True
    return _matching(name.replace("{split}", part)), True


def _is_folder(name: str) -> bool:
    """Returns whether a name is that of a folder. The web has none."""
    if not is_remote(name):
        return os.path.isdir(name)
    if name.startswith(("http://", "https://")) or name.lower().endswith(SUFFIXES):
        return False
    from vit_jax.data.host_tensorflow import tf

    try:
        return tf.io.gfile.isdir(name)
    except tf.errors.OpError as error:
        raise UserError(f"{files.shown(name)}: {files.reason(error)}") from error


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields what `os.walk` yields, for folders on object stores, too."""
    if not is_remote(folder):
        yield from os.walk(folder)
        return
    from vit_jax.data.host_tensorflow import tf

    for place, inner, names in tf.io.gfile.walk(folder):
        yield place.rstrip("/"), inner, names


def _matching(pattern: str) -> list[str]:
    """Returns the files of a name that may have ranges of numbers, as in `{000..015}.tar`."""
    if not is_remote(pattern) and os.path.lexists(pattern):
        return [pattern]
    return [file for name in _numbered(pattern) for file in _matching_one(name)]


def _numbered(pattern: str) -> list[str]:
    """Returns the names that ranges of numbers stand for, which is WebDataset's notation.

    Numbers are as wide as the first one of the range.
    """
    match = _RANGE.search(pattern)
    if not match:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MAX_FILES:
        raise UserError(
            f"{files.shown(pattern)}: write a range from the smaller number to the larger, of at"
            f" most {_MAX_FILES:,} files, as in {{000..015}}"
        )
    rest = _numbered(pattern[match.end() :])
    return [
        f"{pattern[: match.start()]}{number:0{len(match[1])}}{end}"
        for number in range(first, last + 1)
        for end in rest
    ]


def _matching_one(pattern: str) -> list[str]:
    """Returns the file of this name, or else those that match it as a pattern, sorted."""
    if is_remote(pattern):
        from vit_jax.data.host_tensorflow import tf

        try:
            found = [pattern] if "*" not in pattern else sorted(tf.io.gfile.glob(pattern))
        except tf.errors.OpError as error:
            raise UserError(f"{files.shown(pattern)}: {files.reason(error)}") from error
    else:
        found = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
    if not found:
        raise UserError(f"{files.shown(pattern)}: no such file")
    return found


def _in_folder(folder: str, part: str) -> list[str]:
    """Returns the Parquet files of a split in a folder as Hugging Face's Hub lays them out.

    The split is the beginning of a file's name (`data/train-00000-of-00002.parquet`), or the name
    of its folder (`train/0000.parquet`).
    """
    datasets: dict[str, dict[str, list[str]]] = {}
    for place, inner, names in _walk(folder):
        inner[:] = sorted(one for one in inner if not files.is_hidden(one))
        for file in sorted(names):
            match = None if files.is_hidden(file) else _SHARD.fullmatch(file)
            if match:
                base, split = place, match["split"]
                if not re.search(r"[^\W\d]", split) or split.startswith("part-"):
                    base, split = os.path.split(place)
                datasets.setdefault(base, {}).setdefault(split, []).append(
                    os.path.join(place, file)
                )
    if not datasets:
        raise UserError(
            f"{files.shown(folder)} holds no Parquet files; write the name of a table in it, or"
            " save the dataset with to_parquet"
        )
    if len(datasets) > 1:
        one = os.path.relpath(min(datasets), folder)
        raise UserError(
            f"{files.shown(folder)} holds {len(datasets)} datasets; write one of them, as in"
            f" {files.shown(os.path.join(folder, one))}"
        )
    (splits,) = datasets.values()
    for written in same_split(part):
        if written in splits:
            return splits[written]
    raise UserError(
        f"{files.shown(folder)} has no split {part!r}; it has"
        f" {', '.join(map(files.shown, sorted(splits)))} (parts such as 'train[fold 1 of 10]'"
        " divide one)"
    )
