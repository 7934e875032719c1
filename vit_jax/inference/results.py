"""Writes the classes of image files, with their probabilities, as CSV or JSON lines."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.storage import writing_whole
from vit_jax.tasks import BaseTask
from vit_jax.tracking.plain_text import distinct
from vit_jax.training.class_names import class_names

# Spreadsheets take a cell that begins with one of these characters for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Results:
    """A file of results, written while images are read.

    A `.csv` file has one row for each image: `file`, and `class_1`, `probability_1`, ... of the
    most probable classes. A `.jsonl` file has `{"file": ..., "top": [{"class": ..., "probability":
    ...}, ...]}`. With `everything`, the probability of every class comes after these: in columns
    named `probability of CLASS`, or as `{"probabilities": {CLASS: ...}}`.

    Args:
      task: the task that predicted, whose outputs have `probability` `[n, classes]`.
      top: the number of classes for each image.
    """

    def __init__(self, task: BaseTask, top: int, *, everything: bool = False):
        self._names = list(distinct(getattr(task, "classes", ()) or class_names(task)))
        self._top, self._everything = top, everything

    def write(self, path: str, answers: Iterable[tuple[Sequence[str], Mapping[str, Any]]]) -> int:
        """Writes the file; returns the number of images.

        Args:
          answers: batches of (names of the files, outputs of `BaseTask.predict`).

        Raises:
          UserError: the task's answers are no probabilities of classes, or the file cannot be
            written.
        """
        write_rows = self._write_csv if path.lower().endswith(".csv") else self._write_jsonl
        text: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
        try:
            with writing_whole(path) as scratch, open(scratch, "w", **text) as file:
                return write_rows(file, self._rows(answers))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error

    def _rows(
        self, answers: Iterable[tuple[Sequence[str], Mapping[str, Any]]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the file and the probabilities `[classes]` of each image."""
        for names, outputs in answers:
            probability = outputs.get("probability")
            if probability is None:
                raise UserError("--results is for tasks whose answers are probabilities of classes")
            self._names = self._names or [str(number) for number in range(probability.shape[1])]
            yield from zip(names, probability, strict=True)

    def _best(self, row: np.ndarray) -> list[int]:
        return np.argsort(-row, kind="stable")[: self._top].tolist()

    def _write_csv(self, file: Any, rows: Iterator[tuple[str, np.ndarray]]) -> int:
        writer, count = csv.writer(file, lineterminator="\n"), 0
        for count, (name, row) in enumerate(rows, 1):
            if count == 1:
                writer.writerow(self._header())
            cells: list[object] = [_harmless(name)]
            for label in self._best(row):
                cells += [_harmless(self._names[label]), _number(row[label])]
            writer.writerow([*cells, *(map(_number, row) if self._everything else ())])
        return count

    def _header(self) -> list[str]:
        header = ["file"]
        for place in range(1, min(self._top, len(self._names)) + 1):
            header += [f"class_{place}", f"probability_{place}"]
        return header + [f"probability of {x}" for x in self._names if self._everything]

    def _write_jsonl(self, file: Any, rows: Iterator[tuple[str, np.ndarray]]) -> int:
        count = 0
        for name, row in rows:
            count += 1
            best = [(self._names[label], _number(row[label])) for label in self._best(row)]
            top = [{"class": label, "probability": number} for label, number in best]
            record: dict[str, Any] = {"file": name, "top": top}
            if self._everything:
                record["probabilities"] = dict(zip(self._names, map(_number, row), strict=True))
            file.write(json.dumps(record) + "\n")
        return count


def _number(probability: Any) -> float:
    """Returns a probability with the digits that float32 has."""
    return float(f"{float(probability):.7g}")


def _harmless(text: str) -> str:
    """Returns a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text
