"""The writer of Weights & Biases, with a stand-in for its package, and the MLflow example."""

import io
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from vit_jax.tracking import MetricsLog

ROOT = Path(__file__).parents[2]


class FakeRun:
    def __init__(self):
        self.rows, self.metrics, self.finished = [], [], False

    def define_metric(self, *args, **options):
        self.metrics.append((args, options))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    fake = types.SimpleNamespace(runs=[], asked=[], Image=lambda image: image.size)

    def init(**options):
        fake.asked.append(options)
        fake.runs.append(FakeRun())
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_rows_pictures_and_the_config_arrive(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    png = io.BytesIO()
    Image.new("RGB", (3, 2)).save(png, "PNG")
    log = MetricsLog(tmp_path, resume_step=0, writers=["wandb"], config={"seed": 1})
    log.write(1, {"train/loss": 0.5})
    log.image(1, "mistakes", png.getvalue())
    log.close()
    (run,), (asked,) = wandb.runs, wandb.asked
    assert run.rows == [{"step": 1, "train/loss": 0.5}, {"step": 1, "mistakes": (3, 2)}]
    assert (("*",), {"step_metric": "step"}) in run.metrics
    assert run.finished
    assert (asked["project"], asked["config"]) == ("mine", {"seed": 1})


def test_a_run_that_is_started_again_keeps_its_id(tmp_path, wandb):
    for resume_step in (0, 4):
        log = MetricsLog(tmp_path, resume_step=resume_step, writers=["wandb"])
        log.write(resume_step + 1, {"train/loss": 0.5})
        log.close()
    first, second = (asked["id"] for asked in wandb.asked)
    assert first == second
    assert first
    assert wandb.asked[1]["resume"] == "allow"


def test_a_copied_run_has_an_id_of_its_own_and_a_moved_one_keeps_its_id(tmp_path, wandb):
    def id_of(workdir):
        MetricsLog(workdir, resume_step=0, writers=["wandb"]).close()
        return wandb.asked[-1]["id"]

    run, copy, moved = (tmp_path / name for name in ("run", "copy", "moved"))
    run.mkdir()
    (run / "wandb_id").write_text("1234abcd")  # As earlier versions wrote it.
    assert id_of(run) == "1234abcd"
    shutil.copytree(run, copy)
    other = id_of(copy)
    assert other != "1234abcd"
    assert (id_of(run), id_of(copy)) == ("1234abcd", other)
    run.rename(moved)
    assert id_of(moved) == "1234abcd"


@pytest.mark.soak
def test_the_package_itself_takes_all_of_it_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    png = io.BytesIO()
    Image.new("RGB", (3, 2)).save(png, "PNG")
    ids = []
    for resume_step in (0, 2):
        told = []
        config = {"seed": 1, "optim": {"lr": 0.1}}
        options = {"resume_step": resume_step, "config": config, "warn": told.append}
        log = MetricsLog(tmp_path, writers=["wandb"], **options)
        run = log._writers["wandb"]._run
        ids.append(run.id)
        log.write(resume_step + 1, {"train/loss": 0.5})
        log.image(resume_step + 1, "attention", png.getvalue())
        assert run.config["optim"]["lr"] == 0.1
        assert run.summary["train/loss"] == 0.5
        log.close()
        assert told == []
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_without_the_package_the_run_goes_on_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    told = []
    log = MetricsLog(tmp_path, resume_step=0, writers=["wandb"], warn=told.append)
    log.write(1, {"x": 1})
    log.close()
    assert len(told) == 1
    assert told[0].startswith("warning: log writer wandb cannot start: ")
    assert told[0].endswith("install the extra 'wandb' of vit-jax")


def test_the_worked_example_of_a_writer_works(tmp_path, monkeypatch):
    calls = []

    def start_run(*, run_id, run_name):
        calls.append(("start", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "1234"))

    fake = types.SimpleNamespace(
        start_run=start_run,
        log_params=lambda params: calls.append(("params", params)),
        log_metrics=lambda metrics, step: calls.append((step, metrics)),
        end_run=lambda: calls.append(("end",)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(# my_writers\.py\n.*?)```", text, re.DOTALL)
    (tmp_path / "my_writers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    name = "my_writers:MLflow"
    for resume_step in (0, 2):
        log = MetricsLog(
            tmp_path / "run", resume_step=resume_step, writers=[name], config={"seed": 1}
        )
        log.write(resume_step + 2, {"train/loss": 0.5})
        log.close()
    assert calls == [
        ("start", None, "run"),
        ("params", {"seed": 1}),
        (2, {"train/loss": 0.5}),
        ("end",),
        ("start", "1234", "run"),
        (4, {"train/loss": 0.5}),
        ("end",),
    ]
