"""A workdir that version 1 wrote is evaluated, and trained further, by today's code."""

import json
import shutil
from pathlib import Path

import pytest

from vit_jax.__main__ import main
from vit_jax.tracking import read_metrics

STORED = Path(__file__).parents[1] / "golden" / "workdir_v1"


@pytest.fixture
def workdir(tmp_path, digits_npz, monkeypatch):
    """A copy of the stored run, whose data was `digits.npz` in the current folder."""
    shutil.copy(digits_npz, tmp_path / "digits.npz")
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(STORED, tmp_path / "run")


def test_evaluates_to_what_it_logged(workdir, tmp_path):
    out = tmp_path / "metrics.json"
    assert main(["evaluate", f"--workdir={workdir}", f"--json={out}"]) == 0
    logged = read_metrics(workdir)[-1]
    found = json.loads(out.read_text())
    assert found["val/accuracy"] == logged["eval/val/accuracy"]
    assert found["val_ema/loss"] == pytest.approx(logged["eval/val_ema/loss"], rel=1e-5)


def test_goes_on_training(workdir, capsys):
    config = f"--config={Path(__file__).parents[1] / 'tiny.py'}:npz=digits.npz,full=True"
    assert main(["train", config, f"--workdir={workdir}", "--config.total=6"]) == 0
    assert "resuming after step 4" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2, 3, 4, 5, 6]
