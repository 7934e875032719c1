"""A run's model on the hub answers as the run does."""

import json

import numpy as np
import pytest

from vit_jax.__main__ import main
from vit_jax.inference.predict import Predictor

IMAGES = [np.random.default_rng(n).integers(0, 256, (8, 8, 3), np.uint8) for n in range(3)]


def test_a_pushed_run_answers_as_before(hub_server, tiny_config, left_by_a_run, tmp_path, capsys):
    run = tmp_path / "run"
    left_by_a_run(tiny_config(data__eval_pp="decode|resize(8)"), run, classes=("a", "b|c", "d"))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/val/accuracy": 0.5}) + "\n")
    assert main(["push", str(run), "hf://me/digits"]) == 0
    assert "read it back as hf://me/digits" in capsys.readouterr().out
    found = Predictor.from_checkpoint("hf://me/digits")
    expected = Predictor.from_workdir(str(run)).predict(IMAGES)["probability"]
    np.testing.assert_allclose(found.predict(IMAGES)["probability"], expected, atol=1e-6)
    assert found.info.class_names == ("a", "b|c", "d")
    repository = hub_server.repos["me/digits"]
    card = repository["README.md"].decode()
    for part in ("library_name: transformers", "| val/accuracy | 0.5", "decode|resize(8)"):
        assert part in card
    assert json.loads(repository["vit_jax_config.json"])["model"]["name"] == "vit"


def test_a_model_that_transformers_cannot_have_goes_as_a_file(
    hub_server, tiny_config, left_by_a_run, tmp_path
):
    run = tmp_path / "run"
    left_by_a_run(tiny_config(model__pooling="mean", model__num_registers=2), run)
    assert main(["push", str(run), "hf://me/other"]) == 0
    repository = hub_server.repos["me/other"]
    weights = [name for name in repository if name.startswith("model.")]
    assert len(weights) == 1
    assert f"--checkpoint=hf://me/other/{weights[0]}" in repository["README.md"].decode()


@pytest.fixture
def run_to_push(hub_server, tiny_config, left_by_a_run, tmp_path):
    del hub_server
    left_by_a_run(tiny_config(), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("path", "address", "message"),
    [
        ("gone", "hf://me/digits", "holds no run"),
        ("run", "me/digits", "write hf://USER/REPO"),
        ("run", "hf://me/digits/file", "write hf://USER/REPO"),
    ],
)
def test_mistakes_are_one_line(run_to_push, capsys, path, address, message):
    assert main(["push", str(run_to_push.parent / path), address]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
