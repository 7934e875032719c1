"""The metrics log: each row once, whatever happened in between."""

import contextlib
import io
import json
import math
import os
import signal
import string
import struct
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
from ml_collections import ConfigDict
from PIL import Image

from vit_jax import storage
from vit_jax.errors import UserError
from vit_jax.tracking import MetricsLog, read_metrics
from vit_jax.tracking.log import writer_names
from vit_jax.tracking.writers import jsonl


def write_rows(workdir, rows, resume_step=0, **options):
    writer = MetricsLog(workdir, resume_step=resume_step, **options)
    for row in rows:
        writer.write(row["step"], {name: value for name, value in row.items() if name != "step"})
    writer.close()


def losses(steps, offset=0.0):
    return [{"step": step, "train/loss": step / 7 + offset} for step in steps]


def log_lines(workdir):
    return (Path(workdir) / "metrics.jsonl").read_text().splitlines()


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


def test_closing_twice_is_harmless(tmp_path):
    writer = MetricsLog(tmp_path, resume_step=0)
    writer.write(1, {"x": 1})
    writer.close()
    writer.close()


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


def events(directory):
    """All events in files of TensorBoard, read with tensorboardX's own protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(Path(directory).iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def scalar_events(directory):
    """[(step, name, value)] and purge steps."""
    scalars, purges = [], []
    for event in events(directory):
        if event.HasField("session_log"):
            purges.append(event.step)
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return scalars, purges


@pytest.mark.parametrize("is_store", [False, True])
def test_tensorboard_holds_the_same_rows(tmp_path, monkeypatch, is_store):
    monkeypatch.setattr(storage, "is_remote", lambda path: is_store)
    both = {"writers": ["tensorboard"]}
    rows = [{"step": 10, "train/loss": 0.5}, {"step": 20, "train/loss": 0.25}]
    write_rows(tmp_path, rows, **both)
    write_rows(tmp_path, [{"step": 20, "train/loss": 0.125}], resume_step=10, **both)
    scalars, purges = scalar_events(tmp_path / "tensorboard")
    assert sorted(scalars) == [
        (10, "train/loss", 0.5),
        (20, "train/loss", 0.125),
        (20, "train/loss", 0.25),
    ]
    assert purges == [11]


def test_tensorboard_holds_pictures(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (4, 3)).save(picture, "PNG")
    log = MetricsLog(tmp_path, resume_step=0, writers=["tensorboard"])
    log.image(5, "Confusion matrix", picture.getvalue())
    log.close()
    (event,) = [event for event in events(tmp_path / "tensorboard") if event.summary.value]
    (value,) = event.summary.value
    assert (event.step, value.tag, value.image.width) == (5, "Confusion matrix", 4)
    assert value.image.encoded_image_string == picture.getvalue()


def test_tensorboard_keeps_names_as_they_are(tmp_path):
    name = "eval/val/iou/pickup truck (α)"
    write_rows(tmp_path, [{"step": 1, name: 0.5}], writers=["tensorboard"])
    assert scalar_events(tmp_path / "tensorboard") == ([(1, name, 0.5)], [])


def test_tensorboard_goes_on_in_a_new_file_after_a_failed_write(tmp_path, monkeypatch):
    from tensorboardX.event_file_writer import EventsWriter

    flush, said = EventsWriter.flush, []
    log = MetricsLog(tmp_path, resume_step=0, writers=["tensorboard"], warn=said.append)
    log.write(1, {"x": 1})
    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, "flush", full_disk)
        log.write(2, {"x": 2})
        log.write(3, {"x": 3})
    assert EventsWriter.flush is flush
    log.write(4, {"x": 4})
    log.close()
    assert len(said) == 1
    steps = [step for step, *_ in scalar_events(tmp_path / "tensorboard")[0]]
    assert {1, 4} <= set(steps)
    assert len(list((tmp_path / "tensorboard").iterdir())) > 1


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"writers": ["jsonl", "tensorboard"], "tensorboard": True}, ["jsonl", "tensorboard"]),
        ({"writers": ["jsonl", "tensorboard"], "tensorboard": False}, ["jsonl"]),
        ({"writers": [], "tensorboard": True}, []),
    ],
)
def test_tensorboard_can_be_switched_off_in_two_ways(section, expected):
    assert writer_names(ConfigDict(section)) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        ("nowhere:Writer", "cannot be imported"),
        (5, "write the name of a log writer"),
        (["a"], "write the name of a log writer"),
    ],
)
def test_a_writer_that_does_not_exist_is_told(name, message):
    with pytest.raises(UserError, match=message):
        writer_names(ConfigDict({"writers": [name], "tensorboard": True}))


OWN_WRITER = r"""
import json

class Writer:
    def __init__(self, workdir, *, resume_step, config):
        self.path = workdir / "own.txt"
        self.calls = [("open", resume_step, config)]

    def write(self, step, scalars):
        self.calls.append(("write", step, dict(scalars)))

    def flush(self):
        self.calls.append(("flush",))

    def close(self):
        self.path.write_text(json.dumps([*self.calls, ("close",)]))

class Talkative(Writer):
    def message(self, text):
        self.calls.append(("message", text))

    def image(self, step, name, png):
        self.calls.append(("image", step, name, png.decode()))

class Failing:
    def __init__(self, workdir, *, resume_step, config):
        pass

    def write(self, *_):
        raise RuntimeError("the server\nis down")

    flush = close = write

class Unable:
    def __init__(self, workdir, *, resume_step, config):
        raise ConnectionError("no network")
"""


@pytest.fixture
def own_writers(tmp_path, monkeypatch):
    """A module of writers in one file, outside the package."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "own_writers.py").write_text(OWN_WRITER)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield tmp_path
    sys.modules.pop("own_writers", None)


@pytest.mark.parametrize("name", ["Writer", "Talkative"])
def test_one_file_outside_the_package_is_a_writer(own_writers, name):
    write_rows(own_writers, losses([10, 20]))
    options = {"writers": [f"own_writers:{name}"], "config": {"seed": 3}}
    log = MetricsLog(own_writers, resume_step=10, **options)
    log.write(10, {"train/loss": 9.0, "new": np.float32(1)})
    log.message("hello")
    log.image(10, "A picture", b"png")
    log.flush()
    log.close()
    extra = [["message", "hello"], ["image", 10, "A picture", "png"]]
    assert json.loads((own_writers / "own.txt").read_text()) == [
        ["open", 10, {"seed": 3}],
        ["write", 10, {"new": 1.0}],  # A value of before the restart is not written again.
        *(extra if name == "Talkative" else []),
        ["flush"],
        ["close"],
    ]
    assert read_metrics(own_writers) == [{"step": 10, "train/loss": 10 / 7, "new": 1.0}]


@pytest.mark.parametrize(
    ("name", "warnings"), [("Failing", ["failed"] * 2), ("Unable", ["cannot start"])]
)
def test_a_writer_that_fails_costs_a_warning_and_never_the_run(own_writers, name, warnings):
    said = []
    log = MetricsLog(own_writers, resume_step=0, writers=[f"own_writers:{name}"], warn=said.append)
    for row in losses([1, 2, 3]):
        log.write(row["step"], {"train/loss": row["train/loss"]})
        log.flush()
    log.close()  # Says it once more: now it is too late for another try.
    assert read_metrics(own_writers) == losses([1, 2, 3])
    assert len(said) == len(warnings)
    for line, expected in zip(said, warnings, strict=True):
        assert f"own_writers:{name} {expected}" in line
        assert "\n" not in line


def full_disk(*_):
    raise OSError(28, "No space left on device")


class Disk:
    """A file on a disk that takes `room` more bytes."""

    def __init__(self, file):
        self.file, self.room = file, math.inf

    def write(self, data):
        if self.room <= 0:
            full_disk()
        written = self.file.write(data[: min(len(data), self.room)])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(0, 9), st.integers(0, 9))
def test_rows_that_a_full_disk_refused_are_written_when_there_is_room(room, first, last):
    """However much of a line had been written when the disk was full."""
    with tempfile.TemporaryDirectory() as workdir:
        said = []
        log = MetricsLog(workdir, resume_step=0, warn=said.append)
        file = log._writers["jsonl"]._log
        disk = file._file = Disk(file._file)
        for step in range(10):
            disk.room = room if step == first else disk.room
            disk.room = math.inf if step == last else disk.room
            log.write(step, {"train/loss": step / 7})
            log.flush()
        disk.room = math.inf
        log.close()
        assert read_metrics(workdir) == losses(range(10))
        assert len(log_lines(workdir)) == 10
        assert len(said) <= 1


def test_rows_that_a_full_disk_refuses_to_the_end_are_told(tmp_path):
    said = []
    log = MetricsLog(tmp_path, resume_step=0, warn=said.append)
    log.write(1, {"x": 1})
    file = log._writers["jsonl"]._log
    disk = file._file = Disk(file._file)
    disk.room = 0
    log.write(2, {"x": 2})
    log.close()
    assert len(said) == 2
    assert all("jsonl failed: [Errno 28] No space left on device" in line for line in said)
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1}]


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
    """What etils raises of gs://..., where TensorFlow is imported: no OSError."""


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
