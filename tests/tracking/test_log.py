"""The metrics log: each row once, whatever happened in between."""

import contextlib
import json
import math
import os
import signal
import string
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from logged import log_lines, losses, write_rows

from vit_jax import storage
from vit_jax.errors import UserError
from vit_jax.tracking import MetricsLog, read_metrics
from vit_jax.tracking.writers import jsonl


@pytest.fixture
def object_store(monkeypatch):
    """Local paths are treated as if they could not be appended to."""
    monkeypatch.setattr(storage, "is_remote", lambda path: True)


def parts(workdir):
    return sorted(path.name for path in (Path(workdir) / "metrics").iterdir())


def test_rows_are_json_objects_with_the_step_first(tmp_path):
    write_rows(tmp_path, [{"step": 3, "train/loss": 0.5, "train/lr": 1e-3}])
    assert log_lines(tmp_path) == ['{"step": 3, "train/loss": 0.5, "train/lr": 0.001}']


def test_a_row_is_readable_as_soon_as_it_is_written(tmp_path):
    writer = MetricsLog(tmp_path, resume_step=0)
    writer.write(1, {"train/loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 2.0}]
    writer.close()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float64(0.1), 0.1),
        (np.int64(2**53 + 1), 2**53 + 1),
        (np.array(7, np.int32), 7),
        (True, 1),
    ],
)
def test_scalars_of_any_kind_become_plain_and_exact(tmp_path, value, expected):
    write_rows(tmp_path, [{"step": np.int64(1), "x": value}])
    (row,) = read_metrics(tmp_path)
    assert row == {"step": 1, "x": expected}
    assert type(row["x"]) is type(expected)


def test_jax_scalars_are_accepted(tmp_path):
    write_rows(tmp_path, [{"step": 1, "x": jnp.float32(0.5), "n": jnp.int32(3)}])
    assert read_metrics(tmp_path) == [{"step": 1, "x": 0.5, "n": 3}]


def test_non_finite_values_are_valid_json_and_come_back(tmp_path):
    values = {"nan": math.nan, "up": math.inf, "down": -math.inf}
    write_rows(tmp_path, [{"step": 1, **values}])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads(log_lines(tmp_path)[0], parse_constant=refuse)
    assert stored == {"step": 1, "nan": "NaN", "up": "Infinity", "down": "-Infinity"}
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["nan"])
    assert (row["up"], row["down"]) == (math.inf, -math.inf)


_names = st.text(string.ascii_letters + '/_é"\\\n', min_size=1).filter(lambda name: name != "step")
_values = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.integers(0, 2**62), st.dictionaries(_names, _values, min_size=1), max_size=8
    ),
    st.booleans(),
)
def test_what_is_written_is_what_is_read(rows, is_store):
    with tempfile.TemporaryDirectory() as workdir, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "is_remote", lambda path: is_store)
        write_rows(workdir, [{"step": s, **r} for s, r in rows.items()])
        assert read_metrics(workdir) == [{"step": step, **rows[step]} for step in sorted(rows)]


def test_a_second_write_of_a_step_adds_only_new_names(tmp_path):
    writer = MetricsLog(tmp_path, resume_step=0)
    writer.write(5, {"train/loss": 1.0})
    writer.write(5, {"train/loss": 9.0, "eval/test/accuracy": 0.5})
    writer.write(5, {"train/loss": 9.0})
    writer.close()
    assert len(log_lines(tmp_path)) == 2
    assert read_metrics(tmp_path) == [{"step": 5, "train/loss": 1.0, "eval/test/accuracy": 0.5}]


def test_resuming_removes_rows_after_the_checkpoint(tmp_path):
    write_rows(tmp_path, losses(range(0, 60, 10)))
    write_rows(tmp_path, losses(range(40, 80, 10)), resume_step=30)
    assert read_metrics(tmp_path) == losses(range(0, 80, 10))
    assert len(log_lines(tmp_path)) == 8


def test_a_value_computed_again_after_a_restart_is_not_logged_again(tmp_path):
    write_rows(tmp_path, losses([10, 20]))
    write_rows(tmp_path, losses([20, 30], offset=1e-9), resume_step=20)
    assert read_metrics(tmp_path) == losses([10, 20]) + losses([30], offset=1e-9)


def test_a_fresh_run_clears_the_rows_of_one_that_never_saved(tmp_path):
    write_rows(tmp_path, losses([0, 10, 20]))
    write_rows(tmp_path, losses([0, 5], offset=1.0), resume_step=0)
    assert read_metrics(tmp_path) == losses([0]) + losses([5], offset=1.0)


@pytest.mark.parametrize("cut", [1, 2, 9, 20])
def test_a_line_cut_short_by_a_crash_is_removed(tmp_path, cut):
    write_rows(tmp_path, losses([10, 20, 30]))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    survivors = [10, 20, 30] if cut == 1 else [10, 20]
    assert read_metrics(tmp_path) == losses(survivors)
    write_rows(tmp_path, losses([30, 40]), resume_step=30)
    assert read_metrics(tmp_path) == losses([10, 20, 30, 40])


def test_a_damaged_line_inside_costs_that_line_alone(tmp_path):
    write_rows(tmp_path, losses([10, 20, 30]))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'\x00\x00"garbage\n[1]\n' + lines[2])
    assert read_metrics(tmp_path) == losses([10, 30])


NO_ROWS = [
    b"[" * 100_000,
    b'{"step": true, "x": 1}',
    b'{"step": -1, "x": 1}',
    b'{"step": 1e2, "x": 1}',
    b'{"step": 99999999999999999999, "x": 1}',
    b'{"x": 1}',
    b'{"step": 5, "x": "high"}',
    b'{"step": 5, "x": [1]}',
    b'{"step": 5, "x": null}',
    b'{"step": 5, "x": true}',
    b'{"step": 5, "x": 1' + b"0" * 400 + b"}",
    b"\xff\xfe",
    b"null",
]


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_that_is_no_row_is_left_out(tmp_path, line):
    write_rows(tmp_path, losses([10]))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    assert read_metrics(tmp_path) == losses([10])
    write_rows(tmp_path, losses([20]), resume_step=10)
    assert read_metrics(tmp_path) == losses([10, 20])


def test_of_a_row_only_the_numbers_count(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "x": 1, "note": "lr changed"}\n')
    assert read_metrics(tmp_path) == [{"step": 5, "x": 1}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics/part-1-2.jsonl"])
def test_a_folder_in_the_place_of_the_log_is_one_line(tmp_path, name, monkeypatch):
    monkeypatch.setattr(storage, "is_remote", lambda path: name != "metrics.jsonl")
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{name}: the metrics log cannot be read"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="cannot write the metrics log there"):
        MetricsLog(tmp_path, resume_step=0)


def test_a_file_in_the_place_of_the_parts_is_no_log(tmp_path):
    (tmp_path / "metrics").write_text("notes")
    assert read_metrics(tmp_path) == []


def test_opening_an_undamaged_log_leaves_the_file_alone(tmp_path):
    write_rows(tmp_path, losses([10, 20]))
    before = os.stat(tmp_path / "metrics.jsonl")
    write_rows(tmp_path, [], resume_step=20)
    after = os.stat(tmp_path / "metrics.jsonl")
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_killed_process_loses_no_row(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from vit_jax.tracking import MetricsLog\n"
        "writer = MetricsLog(sys.argv[1], resume_step=0)\n"
        "for step in range(1, 101): writer.write(step, {'train/loss': step / 7})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_metrics(tmp_path) == losses(range(1, 101))


def test_a_failing_rewrite_keeps_the_old_log(tmp_path, monkeypatch):
    write_rows(tmp_path, losses([10, 20, 30]))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsonl.os, "replace", fail)
    with pytest.raises(UserError, match="No space left on device"):
        MetricsLog(tmp_path, resume_step=10)
    assert read_metrics(tmp_path) == losses([10, 20, 30])
    assert not list(tmp_path.glob("*.tmp*"))


def test_other_processes_write_nothing(tmp_path):
    write_rows(tmp_path / "new", losses([1]), is_writer=False)
    assert not (tmp_path / "new").exists()


def test_a_workdir_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"workdir .*file/run.*--workdir"):
        MetricsLog(tmp_path / "file" / "run", resume_step=0)


def test_step_is_no_name_of_a_metric(tmp_path):
    writer = MetricsLog(tmp_path, resume_step=0)
    with pytest.raises(ValueError, match="step"):
        writer.write(1, {"step": 2})
    writer.close()


def test_rows_are_durable_after_a_flush_and_at_the_end(tmp_path, monkeypatch):
    log = jsonl.Writer(epath.Path(tmp_path), resume_step=0, config={})
    synced = []
    monkeypatch.setattr(jsonl.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    log.write(1, {"train/loss": 2.0})
    assert synced == []
    log.flush()
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert synced == [size] != [0]
    log.close()
    assert synced == [size, size]


def test_closing_twice_is_harmless(tmp_path):
    writer = MetricsLog(tmp_path, resume_step=0)
    writer.write(1, {"x": 1})
    writer.close()
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1}]


def test_nothing_logged_reads_as_nothing(tmp_path):
    assert read_metrics(tmp_path) == []


def test_object_stores_get_a_part_for_each_checkpoint(tmp_path, object_store):
    writer = MetricsLog(tmp_path, resume_step=0)
    for step in (10, 20):
        writer.write(step, {"train/loss": step / 7})
    assert read_metrics(tmp_path) == []
    writer.flush()
    assert read_metrics(tmp_path) == losses([10, 20])
    writer.write(30, {"train/loss": 30 / 7})
    writer.flush()
    writer.flush()
    writer.close()
    assert parts(tmp_path) == [
        "part-000000000010-000000000020.jsonl",
        "part-000000000030-000000000030.jsonl",
    ]
    assert read_metrics(tmp_path) == losses([10, 20, 30])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_two_flushes_at_one_step_keep_both_rows(tmp_path, object_store):
    writer = MetricsLog(tmp_path, resume_step=0)
    writer.write(10, {"train/loss": 1.0})
    writer.flush()
    writer.write(10, {"eval/test/accuracy": 0.5})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 10, "train/loss": 1.0, "eval/test/accuracy": 0.5}]


def test_resuming_on_an_object_store_cuts_parts(tmp_path, object_store):
    for first in (10, 40):
        write_rows(tmp_path, losses(range(first, first + 30, 10)), resume_step=first - 10)
    write_rows(tmp_path, losses([30, 40]), resume_step=20)
    assert read_metrics(tmp_path) == losses([10, 20, 30, 40])
    assert parts(tmp_path) == [
        "part-000000000010-000000000020.jsonl",
        "part-000000000030-000000000040.jsonl",
    ]


def test_importing_the_report_loads_nothing_heavy():
    heavy = {"jax", "matplotlib", "tensorflow", "tensorboardX", "jinja2", "PIL"}
    script = (
        f"import sys, vit_jax.report, vit_jax.tracking; print(sorted({heavy} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


class TensorflowError(Exception):
    """The error of etils for gs://..., where TensorFlow is imported: no OSError."""


@pytest.fixture(params=["OSError", "TensorFlow's error"])
def strict_store(object_store, monkeypatch, request):
    """A store that refuses appends, and every second write as too early; lists the writes."""
    refusal = OSError(429, "rateLimitExceeded")
    if request.param != "OSError":
        refusal = TensorflowError("rateLimitExceeded")
        module = types.SimpleNamespace(errors=types.SimpleNamespace(OpError=TensorflowError))
        monkeypatch.setitem(sys.modules, "tensorflow", module)
    writes, path_type = [], type(epath.Path("/"))
    write = path_type.write_bytes

    def limited(path, data):
        writes.append(path.name)
        if len(writes) % 2:
            raise refusal
        return write(path, data)

    def refuse(*args, **kwargs):
        raise AssertionError("opened for appending")

    monkeypatch.setattr(path_type, "write_bytes", limited)
    monkeypatch.setattr(jsonl, "open", refuse, raising=False)
    monkeypatch.setattr(storage, "UPLOAD_PAUSES", (0.0, 0.0))
    return writes


def test_a_store_that_limits_the_rate_gets_few_requests_and_all_rows(tmp_path, strict_store):
    with contextlib.closing(MetricsLog(tmp_path, resume_step=0)) as writer:
        for step in range(1, 101):
            writer.write(step, {"train/loss": step / 7})
            if step % 50 == 0:
                writer.flush()
    assert read_metrics(tmp_path) == losses(range(1, 101))
    assert len(strict_store) == 4  # Two checkpoints, each refused once.


def test_rows_that_a_store_refused_go_with_the_next_checkpoint(tmp_path, strict_store, monkeypatch):
    monkeypatch.setattr(storage, "UPLOAD_PAUSES", ())
    said = []
    writer = MetricsLog(tmp_path, resume_step=0, warn=said.append)
    writer.write(1, {"train/loss": 1 / 7})
    writer.flush()
    assert [line.rpartition(": ")[2] for line in said] in (
        ["[Errno 429] rateLimitExceeded"],
        ["rateLimitExceeded"],
    )
    assert read_metrics(tmp_path) == []
    writer.write(2, {"train/loss": 2 / 7})
    writer.close()
    assert read_metrics(tmp_path) == losses([1, 2])
