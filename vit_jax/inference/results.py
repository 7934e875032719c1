"""Writes the classes of image files, with their probabilities, as CSV, JSON lines or Parquet.

While images are read, the answers go to `FILE.partial`: a line that tells what they are answers of,
then one line of JSON for each image. A later call with the same model and settings keeps the
answers of the images that are unchanged, whichever other images are new, changed, or gone. A call
with another model, other names of classes, or other settings begins anew. `FILE` appears when all
is done.
"""

import contextlib
import csv
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from vit_jax.errors import UserError
from vit_jax.storage import json_text, try_lock, writing_whole
from vit_jax.tasks import BaseTask
from vit_jax.tracking.plain_text import distinct
from vit_jax.training.class_names import class_names
from vit_jax.types import Params

# Spreadsheets take a cell that begins with one of these characters for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_TELL_SECONDS = 10.0
_PARTIAL = ".partial"

SUFFIXES = (".csv", ".jsonl", ".parquet")

_Stamp = list[int]

Batches = Iterable[tuple[Sequence[str], Mapping[str, Any]]]
"""Batches of (names of the files, outputs of `BaseTask.predict`)."""


class Results:
    """A file of results.

    A `.csv` file has one row for each image: `file`, and `class_1`, `probability_1`, ... of the
    most probable classes; a `.parquet` file has columns of the same names. A `.jsonl` file has
    `{"file": ..., "top": [{"class": ..., "probability": ...}, ...]}`. With `everything`, the
    probability of every class comes after these: in columns named `probability of CLASS`, or as
    `{"probabilities": {CLASS: ...}}`.

    Args:
      task: the task that predicted, whose outputs have `probability` `[n, classes]`.
      top: the number of classes for each image.
      identity: what tells this model and its settings from others; see `identity_of`.
      tell: called with a line of progress every ten seconds.
    """

    def __init__(
        self,
        task: BaseTask,
        top: int,
        *,
        everything: bool = False,
        identity: str = "",
        tell: Callable[[str], None] = lambda _: None,
    ):
        self._names = list(distinct(getattr(task, "classes", ()) or class_names(task)))
        self._top, self._everything = top, everything
        of = hashlib.blake2b(json.dumps([identity, self._names]).encode(), digest_size=16)
        settings = {"of": of.hexdigest(), "top": top, "everything": everything}
        self._first_line = json.dumps(settings) + "\n"
        self._tell = tell

    def write(
        self, path: str, files: Sequence[str], answers: Callable[[Sequence[str]], Batches]
    ) -> int:
        """Writes the answers in the order of the images; returns the number of images.

        Args:
          files: the image files.
          answers: returns the answers for some of the files.

        Raises:
          UserError: the task's answers are no probabilities of classes, or the file cannot be
            written, or another process is writing it.
        """
        partial = path + _PARTIAL
        try:
            with _alone(partial):
                places = self._filled(partial, {file: _stamp(file) for file in files}, answers)
                with open(partial, "rb") as lines, writing_whole(path) as scratch:
                    records = (_record_at(lines, places[file]) for file in files)
                    _WRITERS[os.path.splitext(path)[1].lower()](scratch, records)
                os.unlink(partial)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error
        return len(files)

    def _filled(
        self,
        partial: str,
        stamps: Mapping[str, _Stamp],
        answers: Callable[[Sequence[str]], Batches],
    ) -> dict[str, int]:
        """Appends the answers that a partial file lacks; returns where the line of each begins."""
        given = self._resumed(partial)
        left = [one for one, stamp in stamps.items() if one not in given or given[one][0] != stamp]
        if len(left) < len(stamps):
            self._tell(f"{len(stamps) - len(left):,} images are in {partial} already")
        try:
            if left:
                with open(partial, "a", encoding="utf-8") as file:
                    self._append(file, answers(left), stamps, len(left))
        finally:
            given = self._resumed(partial)
            if not given:
                os.unlink(partial)
        return {file: given[file][1] for file in stamps}

    def _resumed(self, partial: str) -> dict[str, tuple[_Stamp, int]]:
        """Returns for each image in a partial file its stamp, and where its last line begins.

        The file is cut before a damaged line.
        """
        found: dict[str, tuple[_Stamp, int]] = {}
        with contextlib.suppress(FileNotFoundError), open(partial, "rb+") as file:
            if file.readline() == self._first_line.encode():
                end = file.tell()
                for line in file:
                    record = _record_of(line)
                    if record is None:
                        break
                    found[record["file"]] = record["stamp"], end
                    end += len(line)
                file.truncate(end)
                return found
        with open(partial, "w", encoding="utf-8") as file:
            file.write(self._first_line)
        return found

    def _append(
        self, file: Any, answers: Batches, stamps: Mapping[str, _Stamp], total: int
    ) -> None:
        """Writes answers as lines, and tells the progress towards `total` images."""
        began = told = time.monotonic()
        count = 0
        for names, outputs in answers:
            for name, row in zip(names, self._probabilities(outputs), strict=True):
                record = {**self._record(name, row), "stamp": stamps[name]}
                file.write(json.dumps(record) + "\n")
                count += 1
            file.flush()
            now = time.monotonic()
            if now - told > _TELL_SECONDS:
                told, rate = now, count / (now - began)
                left = (total - count) / rate / 60
                self._tell(
                    f"{count:,} of {total:,} images, {rate:.0f} images/s, {left:.0f} min left"
                )

    def _probabilities(self, outputs: Mapping[str, Any]) -> np.ndarray:
        probability = outputs.get("probability")
        if probability is None:
            raise UserError("--results is for tasks whose answers are probabilities of classes")
        self._names = self._names or [str(number) for number in range(probability.shape[1])]
        return probability

    def _record(self, name: str, row: np.ndarray) -> dict[str, Any]:
        best = np.argsort(-row, kind="stable")[: self._top].tolist()
        top = [{"class": self._names[k], "probability": _number(row[k])} for k in best]
        record: dict[str, Any] = {"file": name, "top": top}
        if self._everything:
            record["probabilities"] = dict(zip(self._names, map(_number, row), strict=True))
        return record


@contextlib.contextmanager
def _alone(partial: str) -> Iterator[None]:
    """Keeps other processes of this host from writing a partial file until the block ends.

    Raises:
      UserError: another process is writing it.
    """
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(partial, "ab"))
            is_ours = try_lock(file.fileno())
            if is_ours is False:
                raise UserError(
                    f"another process is writing {partial}; wait for it, or write another FILE"
                )
            if is_ours is None:
                break
            # The process that held the lock may have finished, and removed what is open here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                    break
        yield


def identity_of(params: Params, settings: Sequence[str]) -> str:
    """Returns what stays equal as long as a model and the settings of its answers do.

    Args:
      settings: what else the answers depend on, such as `Predictor.settings`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    digest.update(json.dumps(list(settings)).encode())
    return digest.hexdigest()


def _stamp(file: str) -> _Stamp:
    """Returns what changes when a file is replaced: its size and its time of change."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(file)
        return [status.st_size, status.st_mtime_ns]
    return []


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns of a row."""
    row = {"file": record["file"]}
    for place, one in enumerate(record["top"], 1):
        row |= {f"class_{place}": one["class"], f"probability_{place}": one["probability"]}
    more = record.get("probabilities", {})
    return row | {f"probability of {name}": number for name, number in more.items()}


def _write_csv(path: str, records: Iterator[Mapping[str, Any]]) -> None:
    text: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with open(path, "w", **text) as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, row in enumerate(map(_flat, records)):
            if not number:
                writer.writerow(row)
            cells = row.values()
            writer.writerow([_harmless(x) if isinstance(x, str) else x for x in cells])


def _write_jsonl(path: str, records: Iterator[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json_text(record) + "\n" for record in records)


def _write_parquet(path: str, records: Iterator[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [_flat(record) for record in records]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    # Names of files that are not valid UTF-8 are no texts of Parquet.
    columns["file"] = [x.encode(errors="backslashreplace").decode() for x in columns["file"]]
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


_WRITERS: Mapping[str, Callable[[str, Iterator[Mapping[str, Any]]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


def _record_of(line: bytes) -> dict[str, Any] | None:
    """Returns the record in a line of a partial file; None if the line is damaged.

    A power cut may leave zeros in it.
    """
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if line.endswith(b"\n") and isinstance(record, dict) and {"file", "stamp"} <= set(record):
            return record
    return None


def _record_at(lines: BinaryIO, place: int) -> dict[str, Any]:
    """Returns the record in the line that begins at `place`, without its stamp."""
    lines.seek(place)
    record = json.loads(lines.readline())
    del record["stamp"]
    return record


def _number(probability: Any) -> float:
    """Returns a probability with the digits that float32 has."""
    return float(f"{float(probability):.7g}")


def _harmless(text: str) -> str:
    """Returns a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text
