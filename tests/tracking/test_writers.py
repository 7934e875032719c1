"""TensorBoard, writers of users' own, and writers that fail."""

import io
import json
import math
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logged import log_lines, losses, write_rows
from ml_collections import ConfigDict
from PIL import Image

from vit_jax import storage
from vit_jax.errors import UserError
from vit_jax.tracking import MetricsLog, read_metrics
from vit_jax.tracking.log import writer_names


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


def test_tensorboard_holds_the_config_once_as_text_and_as_hyperparameters(tmp_path):
    config = {"seed": 1, "optim": {"lr": 0.5, "b": [1, 2]}, "none": None}
    for resume_step in (0, 5):
        log = MetricsLog(tmp_path, resume_step=resume_step, writers=["tensorboard"], config=config)
        log.write(resume_step + 1, {"x": 1})
        log.close()
    values = [v for event in events(tmp_path / "tensorboard") for v in event.summary.value]
    (text,) = [v.tensor.string_val[0].decode() for v in values if v.tag.startswith("config")]
    assert json.loads(text) == config
    told = b"".join(v.metadata.plugin_data.content for v in values if "hparams" in v.tag)
    for part in (b"seed", b"optim.lr", b"optim.b", b"[1, 2]"):
        assert part in told
    assert b"none" not in told


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
