"""The time before the first step: signals, errors, and workdirs that cannot be trained in."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from vit_jax import config as config_lib
from vit_jax import data
from vit_jax.__main__ import main
from vit_jax.checkpoints.store import Store
from vit_jax.errors import UserError
from vit_jax.tasks import classification, segmentation
from vit_jax.tracking import read_metrics
from vit_jax.training import background, loop, run
from vit_jax.training.lock import WorkdirLock
from vit_jax.training.loop import train
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec

TINY = Path(__file__).parents[1] / "tiny.py"
SIGNALS = [(signal.SIGTERM, 75, "SIGTERM: stopped"), (signal.SIGINT, 130, "interrupted")]


def command(npz, workdir, *flags):
    return ["train", f"--config={TINY}:npz={npz}", f"--workdir={workdir}", *flags]


MOMENTS = {
    "config": (config_lib, "load"),
    "data": (run, "open_source"),
    "restore": (Store, "restore_newest"),
    "log": (loop, "open_log"),
    "compile": (background, "start"),
}


@pytest.mark.parametrize("ending", SIGNALS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_before_the_first_step_ends_the_run_in_one_line(
    digits_npz, tmp_path, monkeypatch, capsys, *, moment, ending
):
    number, code, line = ending

    def stop(*_, **__):
        signal.raise_signal(number)
        time.sleep(60)
        raise AssertionError("the signal was lost")

    def compile_for_ever(_):
        threading.Timer(0.5, lambda: os.kill(os.getpid(), number)).start()
        return Future()

    monkeypatch.setattr(*MOMENTS[moment], compile_for_ever if moment == "compile" else stop)
    assert main(command(digits_npz, tmp_path / "run")) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(line)
    assert not any("Traceback" in said for said in said)
    left = {path.name for path in tmp_path.rglob("*")}
    assert left <= {"run", "config.json", "metrics.jsonl"}


def test_a_signal_that_a_library_turns_into_an_error_is_still_a_signal(
    digits_npz, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise ImportError("cannot import a part of this library") from error

    monkeypatch.setattr(run, "open_source", fail)
    assert main(command(digits_npz, tmp_path / "run")) == 75
    assert "SIGTERM: stopped" in capsys.readouterr().err


def test_a_signal_within_a_callback_is_not_lost(digits_npz, tmp_path, monkeypatch, capsys):
    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def drop(*_):
        Dropped()
        time.sleep(60)

    monkeypatch.setattr(run, "open_source", drop)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    assert main(command(digits_npz, tmp_path / "run")) == 75
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_in_the_start_does_not_wait_for_the_compiler(digits_npz, tmp_path):
    """The compiler takes for ever here; the wrong checkpoint ends the process at once."""
    code = (
        "import sys, time\n"
        "from vit_jax.training.run import Run\n"
        "Run.compile_step = lambda self: time.sleep(1e6)\n"
        "from vit_jax.__main__ import main\n"
        "sys.exit(main())"
    )
    flags = command(digits_npz, tmp_path / "run", "--config.init.checkpoint=/absent.npz")
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(TINY.parent.parent)},
    )
    assert done.returncode == 2, done.stderr
    assert "error: config.init" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "LOCK").exists()


def test_a_second_training_in_a_workdir_ends_in_one_line(digits_npz, tmp_path, capsys):
    workdir = Workdir.open(str(tmp_path))
    with WorkdirLock(workdir.path):
        assert main(command(digits_npz, tmp_path)) == 2
        said = capsys.readouterr().err
        assert f"workdir={tmp_path} is in use by process {os.getpid()} on " in said
        assert len(said.strip().splitlines()) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"LOCK"}


def test_a_workdir_may_have_any_name(tiny_config, tmp_path):
    workdir = tmp_path / "lr[0.01] *? {a} 100%\n日本"
    train(tiny_config(total=2), str(workdir))
    assert not (workdir / "LOCK").exists()
    train(tiny_config(total=4), str(workdir))
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2, 3, 4]
    assert Store(workdir / "checkpoints").newest() == 4


@pytest.mark.parametrize("name", ["a\\b", "a\udcff", "a\0b"])
def test_a_workdir_that_cannot_be_written_to_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"^workdir=.*write another path"):
        Workdir.open(str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_moved_in_mid_run_ends_the_run(tiny_config, tmp_path, monkeypatch):
    """It is not made again, half empty, where it was."""
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    store = Store(workdir / "checkpoints")
    step = loop.StepLog.step

    def move_at_5(self, at, *rest):
        if at == 5:
            while not store.steps():  # A checkpoint that is being written would be lost.
                time.sleep(0.01)
            workdir.rename(moved)
        return step(self, at, *rest)

    monkeypatch.setattr(loop.StepLog, "step", move_at_5)
    with pytest.raises(UserError, match="was moved, deleted or unmounted"):
        train(tiny_config(total=8), str(workdir))
    assert not workdir.exists()
    assert Store(moved / "checkpoints").steps() == [3]


def test_images_that_move_away_from_their_boxes_are_refused(tiny_config):
    arrays = {
        "image": ArraySpec((8, 8, 3), np.dtype(np.uint8)),
        "boxes": ArraySpec((4, 4), np.dtype(np.float32)),
        "box_label": ArraySpec((4,), np.dtype(np.int32)),
    }
    joint, alone = "joint_decode|joint_flip_lr", "decode|flip_lr"
    for key in ("data.pp", "data.eval_pp", "eval.sets.val.pp"):
        config = tiny_config(data__pp=joint, data__eval_pp=joint)
        config.task = {"name": "detection"}
        config.eval.sets = {"val": {"split": "val", "pp": joint}}
        section, _, name = key.rpartition(".")
        part = config.eval.sets["val"] if "val" in section else config.data
        part[name] = alone
        with pytest.raises(UserError, match=rf"^config\.{key}: 'flip_lr' moves the pixels"):
            run.Run.build(config, source=data.Expected(arrays, 9, 3))
    assert segmentation.Task.placed_labels == ("segmentation",)
    assert classification.Task.placed_labels == ()
