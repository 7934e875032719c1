"""Writes the classes of image files, with their probabilities, as CSV, JSON lines or Parquet.

While images are read, the answers go to `FILE.partial`: a line that tells what they are answers of,
then one line of JSON for each image. A later call for the same model and images goes on after its
last line; one with other names of classes, or other settings, begins anew. `FILE` appears when all
is done.
"""

import contextlib
import csv
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

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
      identity: what tells these answers from others; see `identity_of`.
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

    def write(self, path: str, answers: Callable[[int], Batches], total: int = 0) -> int:
        """Writes the file; returns the number of images.

        Args:
          answers: returns the answers from an image on, whose number is given.
          total: the number of all images, for the progress.

        Raises:
          UserError: the task's answers are no probabilities of classes, or the file cannot be
            written, or another process is writing it.
        """
        partial = path + _PARTIAL
        try:
            with _alone(partial):
                count = self._filled(partial, answers, total)
                with open(partial, encoding="utf-8") as file, writing_whole(path) as scratch:
                    next(file)
                    _WRITERS[os.path.splitext(path)[1].lower()](scratch, map(json.loads, file))
                os.unlink(partial)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error
        return count

    def _filled(self, partial: str, answers: Callable[[int], Batches], total: int) -> int:
        """Appends the answers that a partial file lacks; returns the number of all."""
        count = self._resumed(partial)
        if count:
            self._tell(f"{count:,} images are in {partial} already")
        try:
            with open(partial, "a", encoding="utf-8") as file:
                return self._append(file, answers(count), count, total)
        finally:
            if not self._resumed(partial):
                os.unlink(partial)

    def _resumed(self, partial: str) -> int:
        """Returns the number of answers in a partial file, which it cuts before a damaged one."""
        with contextlib.suppress(FileNotFoundError), open(partial, "rb+") as file:
            if file.readline() == self._first_line.encode():
                count, end = 0, file.tell()
                for line in file:
                    if not _is_record(line):
                        break
                    count, end = count + 1, end + len(line)
                file.truncate(end)
                return count
        with open(partial, "w", encoding="utf-8") as file:
            file.write(self._first_line)
        return 0

    def _append(self, file: Any, answers: Batches, count: int, total: int) -> int:
        began = told = time.monotonic()
        first = count
        for names, outputs in answers:
            for name, row in zip(names, self._probabilities(outputs), strict=True):
                file.write(json.dumps(self._record(name, row)) + "\n")
                count += 1
            file.flush()
            now = time.monotonic()
            if total and now - told > _TELL_SECONDS:
                told, rate = now, (count - first) / (now - began)
                left = (total - count) / rate / 60
                self._tell(
                    f"{count:,} of {total:,} images, {rate:.0f} images/s, {left:.0f} min left"
                )
        return count

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


def identity_of(params: Params, settings: Sequence[str], files: Sequence[str]) -> str:
    """Returns what stays equal as long as a model and the images that it answers do.

    Args:
      settings: what else the answers depend on, such as the preparation of the images in words.
      files: the image files, of which the names, the sizes and the times of change are compared.
    """
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    told = json.dumps([list(settings), [[file, *_stamp(file)] for file in files]])
    digest.update(told.encode())
    return digest.hexdigest()


def _stamp(file: str) -> list[int]:
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


def _is_record(line: bytes) -> bool:
    """Returns whether a line of a partial file is whole. A power cut may leave zeros in it."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _number(probability: Any) -> float:
    """Returns a probability with the digits that float32 has."""
    return float(f"{float(probability):.7g}")


def _harmless(text: str) -> str:
    """Returns a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text
