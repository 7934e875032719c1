"""The metrics log: `metrics.jsonl`, and the same numbers as TensorBoard events.

One JSON object a line, `step` first, then plain scalar names:

    {"step": 100, "train/loss": 0.6931, "train/lr": 0.001}
    {"step": 100, "eval/test/accuracy": 0.958}

A row belongs to the step it names, and a value is logged once: the first value written for a
(step, name) stands, also when a restarted run computes it again. A second write for a step adds
only the names that are new there, as a line of its own; `read_metrics` joins the lines of a step.

JSON has no NaN or infinity, so these are the strings "NaN", "Infinity" and "-Infinity" (the
mapping of protocol buffers, and what Python's `float` reads back).

Where files cannot be appended to (object stores), rows wait in memory until `flush`, which the
loop calls at checkpoints, and become `metrics/part-FIRST-LAST.jsonl`. `read_metrics` reads both.
"""

import contextlib
import json
import math
import operator
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from absl import logging
from etils import epath

from vit_jax import storage
from vit_jax.errors import UserError
from vit_jax.storage import write_atomically

LOG_NAME = "metrics.jsonl"
PARTS_NAME = "metrics"
EVENTS_NAME = "tensorboard"


Scalar = int | float
Row = dict[str, Scalar]

WITHIN_TRAIN = ("input wait", "eval", "save")
"""Parts of the time of a run (`time/...`) that lie in its part `train`."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends rows of scalars to the log of a run and to its TensorBoard events.

    Opening the log makes it what it was when the checkpoint of `resume_step` was saved: rows of
    later steps, and a last line that a crash cut short, are removed.

    Args:
      workdir: directory of the run, local or on an object store; made if absent.
      resume_step: the step the run continues from; 0 for a fresh run.
      is_writer: False on processes other than the first, whose writer then does nothing.
      tensorboard: whether to write events too.

    Raises:
      UserError: the directory or the log cannot be written.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        resume_step: int,
        is_writer: bool = True,
        tensorboard: bool = True,
    ):
        self._log: _AppendedLog | _PartedLog | None = None
        if not is_writer:
            return
        workdir = epath.Path(workdir)
        with _explained(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            open_log = _PartedLog if storage.is_remote(workdir) else _AppendedLog
            self._log, rows = open_log.resume(workdir, resume_step)
        self._workdir = workdir
        self._events = _Events(workdir / EVENTS_NAME, resume_step) if tensorboard else None
        self._names_at: dict[int, set[str]] = {}
        for row in rows:
            self._names_at.setdefault(row["step"], set()).update(row)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Logs `scalars` (anything `float` takes: Python, NumPy or JAX) as values of `step`."""
        if self._log is None:
            return
        if "step" in scalars:
            raise ValueError("'step' is the row's own key and cannot name a metric")
        step = operator.index(step)
        known = self._names_at.setdefault(step, set())
        new = {name: _plain(value) for name, value in scalars.items() if name not in known}
        if not new:
            return
        known.update(new)
        with _explained(self._workdir):
            self._log.append({"step": step, **new})
            if self._events is not None:
                self._events.append(step, new)

    def flush(self) -> None:
        """Makes all rows so far durable; called when a checkpoint is saved."""
        if self._log is None:
            return
        with _explained(self._workdir):
            self._log.flush()
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        """Flushes and lets go of the files; may be called twice."""
        if self._log is None:
            return
        self.flush()
        with _explained(self._workdir):
            self._log.close()
            if self._events is not None:
                self._events.close()
        self._log = None


def read_metrics(workdir: epath.PathLike) -> list[Row]:
    """The log of `workdir`, one row a step in step order; empty where nothing was logged yet.

    Safe to call while the run is going: a line still being written is left out.
    """
    workdir = epath.Path(workdir)
    rows = _read_rows(workdir / LOG_NAME)
    for part in _parts(workdir / PARTS_NAME):
        rows += _read_rows(part)
    joined: dict[int, Row] = {}
    for row in rows:
        first_values = joined.setdefault(row["step"], {})
        for name, value in row.items():
            first_values.setdefault(name, value)
    return [joined[step] for step in sorted(joined)]


class _AppendedLog:
    """`metrics.jsonl` on a file system: a row reaches the kernel as soon as it is appended."""

    def __init__(self, file: BinaryIO):
        self._file = file

    @classmethod
    def resume(cls, workdir: epath.Path, resume_step: int) -> tuple["_AppendedLog", list[Row]]:
        path = workdir / LOG_NAME
        before = path.read_bytes() if path.exists() else b""
        rows = _kept(_parse(before, path), resume_step)
        after = _encode(rows)
        if after != before:
            write_atomically(path, after)
        # Unbuffered: a process killed later takes no rows with it.
        return cls(open(path, "ab", buffering=0)), rows

    def append(self, row: Row) -> None:
        line = memoryview(_encode([row]))
        while line:  # a raw write may take only part of a line
            line = line[self._file.write(line) :]

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _PartedLog:
    """`metrics/part-FIRST-LAST.jsonl` on an object store: a file for each flush."""

    def __init__(self, directory: epath.Path):
        self._directory = directory
        self._rows: list[Row] = []

    @classmethod
    def resume(cls, workdir: epath.Path, resume_step: int) -> tuple["_PartedLog", list[Row]]:
        log = cls(workdir / PARTS_NAME)
        kept_rows = []
        for part in _parts(log._directory):
            rows = _read_rows(part)
            kept = _kept(rows, resume_step)
            kept_rows += kept
            if len(kept) < len(rows):
                # The shorter part first: a crash in between leaves rows twice, never none.
                log._write_part(kept)
                part.unlink()
        return log, kept_rows

    def append(self, row: Row) -> None:
        self._rows.append(row)

    def flush(self) -> None:
        self._write_part(self._rows)
        self._rows = []

    def close(self) -> None:
        """Nothing is held open; `flush` came before."""

    def _write_part(self, rows: list[Row]) -> None:
        if not rows:
            return
        steps = [row["step"] for row in rows]
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"part-{min(steps):012d}-{max(steps):012d}.jsonl"
        earlier = _read_rows(path)  # two flushes may cover the same single step
        write_atomically(path, _encode(earlier + [row for row in rows if row not in earlier]))


class _Events:
    """TensorBoard events through tensorboardX, which needs no TensorFlow.

    Events are written at once, by this thread: tensorboardX's own writer queues them, and its
    `flush` does not wait for the queue. On an object store the event file grows in a local scratch
    directory and is copied at `flush`.
    """

    def __init__(self, directory: epath.Path, resume_step: int):
        self._directory = directory
        self._resume_step = resume_step
        self._scratch: str | None = None
        self._writer = None

    def append(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None:
            self._writer = self._open()
        values = [Summary.Value(tag=name, simple_value=x) for name, x in scalars.items()]
        self._write(step, summary=Summary(value=values))

    def _open(self):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        local = os.fspath(self._directory)
        if storage.is_remote(self._directory):
            local = self._scratch = tempfile.mkdtemp(prefix="vit_jax_events_")
        os.makedirs(local, exist_ok=True)
        is_continued = self._directory.exists() and any(self._directory.iterdir())
        # The name holds seconds; the suffix keeps a quick restart from overwriting the file.
        suffix = f".from{self._resume_step}"
        self._writer = EventsWriter(os.path.join(local, "events"), suffix)
        if is_continued:
            # TensorBoard then hides what an earlier process logged past the checkpoint.
            start = SessionLog(status=SessionLog.START)
            self._write(self._resume_step + 1, session_log=start)
        return self._writer

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()

    def flush(self) -> None:
        if self._writer is None or self._scratch is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in epath.Path(self._scratch).iterdir():
            path.copy(self._directory / path.name, overwrite=True)

    def close(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _plain(value: Any) -> Scalar:
    """A Python int or float from any scalar; integers stay exact whatever their size."""
    try:
        return int(operator.index(value))
    except TypeError:
        return float(value)


def _kept(rows: Iterable[Row], resume_step: int) -> list[Row]:
    return [row for row in rows if row["step"] <= resume_step]


def _encode(rows: Iterable[Row]) -> bytes:
    return b"".join(
        json.dumps({name: _jsonable(value) for name, value in row.items()}).encode() + b"\n"
        for row in rows
    )


def _jsonable(value: Scalar) -> Scalar | str:
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _read_rows(path: epath.Path) -> list[Row]:
    return list(_parse(path.read_bytes(), path)) if path.exists() else []


def _parse(data: bytes, path: epath.Path) -> Iterator[Row]:
    """The rows of a log. Lines that are none are left out: silently at the end, else said."""
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        row = _parse_line(line)
        if row is not None:
            yield row
        elif number < len(lines):  # a torn line has no newline after it
            logging.warning("%s line %d is not a row of metrics; left out", path, number)


def _parse_line(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {
        name: _NON_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in row.items()
    }


def _parts(directory: epath.Path) -> list[epath.Path]:
    return sorted(directory.glob("part-*.jsonl")) if directory.exists() else []


@contextlib.contextmanager
def _explained(workdir: epath.Path) -> Iterator[None]:
    """Turns a failure of the file system into one line for the user."""
    try:
        yield
    except storage.errors() as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"workdir {os.fspath(workdir)}: cannot write the metrics log there ({reason}); "
            "free space, or name a directory you may write to with --workdir"
        ) from error
