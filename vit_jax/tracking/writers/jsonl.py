"""The metrics log in the workdir, which the report reads and a resumed run cuts: see `rows`."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from vit_jax import storage
from vit_jax.errors import UserError
from vit_jax.storage import write_atomically
from vit_jax.tracking import rows as rows_lib
from vit_jax.tracking.rows import LOG_NAME, PARTS_NAME, Row, Scalar, encode, read_rows


class Writer:
    """Appends rows to `metrics.jsonl`, or writes parts where files cannot be appended to.

    Opening the log makes it what it was when the checkpoint of `resume_step` was saved: rows of
    later steps, and a last line that a crash cut short, are removed.

    A row that cannot be written is kept, and written before the next one.

    Raises:
      UserError: the directory or the log cannot be written.
    """

    def __init__(self, workdir: epath.Path, *, resume_step: int, config: Mapping[str, Any]):
        del config
        open_log = _Parts if storage.is_remote(workdir) else _File
        with _explained(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            self._log = open_log(workdir, resume_step)

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Appends a row. On a file system, it reaches the kernel before this returns."""
        self._log.append({"step": step, **scalars})

    def flush(self) -> None:
        """Makes all rows so far durable."""
        self._log.flush()

    def close(self) -> None:
        """Makes all rows durable and closes the file."""
        self._log.close()


class _File:
    """`metrics.jsonl` on a file system."""

    def __init__(self, workdir: epath.Path, resume_step: int):
        path = workdir / LOG_NAME
        before = storage.read_bytes(path) if path.exists() else b""
        after = encode(_until(rows_lib.decode(before, path), resume_step))
        if after != before:
            write_atomically(path, after)
        # Unbuffered: a process killed later takes no rows with it.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._unwritten = b""

    def append(self, row: Row) -> None:
        self._unwritten += encode([row])
        self._write()

    def flush(self) -> None:
        self._write()
        os.fsync(self._file.fileno())

    def _write(self) -> None:
        while self._unwritten:  # A raw write may take only part of the bytes.
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


class _Parts:
    """`metrics/part-FIRST-LAST.jsonl` on an object store: a file for each flush."""

    def __init__(self, workdir: epath.Path, resume_step: int):
        self._directory = workdir / PARTS_NAME
        self._rows: list[Row] = []
        for part in rows_lib.parts(workdir):
            rows = read_rows(part)
            kept = _until(rows, resume_step)
            if len(kept) < len(rows):
                # The shorter part first: a crash in between leaves rows twice, never none.
                self._write_part(kept)
                part.unlink()

    def append(self, row: Row) -> None:
        self._rows.append(row)

    def flush(self) -> None:
        self._write_part(self._rows)
        self._rows = []

    def close(self) -> None:
        self.flush()

    def _write_part(self, rows: list[Row]) -> None:
        if not rows:
            return
        steps = [row["step"] for row in rows]
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"part-{min(steps):012d}-{max(steps):012d}.jsonl"
        earlier = read_rows(path)  # Two flushes may cover the same single step.
        write_atomically(path, encode(earlier + [row for row in rows if row not in earlier]))


def _until(rows: Iterable[Row], resume_step: int) -> list[Row]:
    return [row for row in rows if row["step"] <= resume_step]


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
