"""The stored form of the metrics log: one JSON object per line, `step` first, then scalars.

    {"step": 100, "train/loss": 0.6931, "train/lr": 0.001}
    {"step": 100, "eval/test/accuracy": 0.958}

A row belongs to the step that it names. Several lines may hold values of one step, and the first
value of a (step, name) counts.

Values that are not finite are strings, see `storage.json_text`.

On a file system the rows are in `metrics.jsonl`. On object stores, where files cannot be appended
to, they are in `metrics/part-FIRST-LAST.jsonl`.
"""

import logging
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from vit_jax import storage
from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

LOG_NAME = "metrics.jsonl"
PARTS_NAME = "metrics"

Scalar = int | float
Row = dict[str, Scalar]

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_metrics(workdir: epath.PathLike) -> list[Row]:
    """Returns the log of `workdir`, one row per step in step order; [] if nothing was logged yet.

    The function may be called while the run continues: it leaves out incomplete and invalid lines.

    Raises:
      UserError: a file of the log cannot be read.
    """
    workdir = epath.Path(workdir)
    rows = []
    for path in (workdir / LOG_NAME, *parts(workdir)):
        try:
            rows += read_rows(path)
        except storage.errors() as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{path}: the metrics log cannot be read ({reason}); restore it or remove it"
            ) from error
    joined: dict[int, Row] = {}
    for row in rows:
        first_values = joined.setdefault(int(row["step"]), {})
        for name, value in row.items():
            first_values.setdefault(name, value)
    return [joined[step] for step in sorted(joined)]


def read_rows(path: epath.Path) -> list[Row]:
    """Returns the rows of one file; none if there is no such file."""
    return list(decode(storage.read_bytes(path), path)) if path.exists() else []


def parts(workdir: epath.Path) -> list[epath.Path]:
    """Returns the files that hold the log of a run on an object store."""
    folder = workdir / PARTS_NAME
    return sorted(storage.literal(folder).glob("part-*.jsonl")) if folder.is_dir() else []


def encode(rows: Iterable[Row]) -> bytes:
    """Returns rows as lines of JSON."""
    return b"".join(storage.json_text(row).encode() + b"\n" for row in rows)


def decode(data: bytes, path: epath.Path) -> Iterator[Row]:
    """Yields the rows of the lines of a log.

    Invalid lines are left out: a last line without a newline silently, others with a warning that
    names `path`.
    """
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        row = _decode_line(line)
        if row is not None:
            yield row
        elif number < len(lines):  # A crash leaves a last line without a newline.
            logger.warning("%s line %d is not a row of metrics; left out", path, number)


def _decode_line(line: bytes) -> Row | None:
    try:
        found = storage.parse_json(line)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    step = found.pop("step", None)
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
        return None
    values: dict[str, Any] = {
        name: _NON_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in found.items()
    }
    numbers: Row = {name: value for name, value in values.items() if _is_scalar(value)}
    return {"step": step, **numbers} if numbers or not found else None


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)
