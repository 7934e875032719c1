"""The package as a library: what `import vit_jax` offers."""

import logging

import flax.linen as nn
import numpy as np
import pytest

import vit_jax
from vit_jax.errors import UserError
from vit_jax.training.outcome import Outcome
from vit_jax.types import Features


class Plain(nn.Module):
    """A module as anyone writes it: its parameters name no logical axes."""

    width: int = 8

    @nn.compact
    def __call__(self, images, *, train=False):
        grid = nn.relu(nn.Conv(self.width, (4, 4), strides=4)(images))
        return Features(grid=grid, pooled=grid.mean((1, 2)))


class Notes:
    """A callback that notes what it is told."""

    def __init__(self):
        self.told = []

    def on_step(self, step, metrics):
        self.told.append(("step", step, metrics["train/loss"]))

    def on_evaluate(self, step, metrics):
        self.told.append(("evaluate", step, metrics["val/accuracy"]))

    def on_save(self, step):
        self.told.append(("save", step))

    def on_end(self, outcome):
        self.told.append(("end", outcome))


@pytest.fixture(scope="module")
def trained(digits_npz, tmp_path_factory):
    """(notes, outcome, workdir) of a run of a plain module, trained and called from Python."""
    config = vit_jax.config.load(f"tests/tiny.py:{digits_npz}")
    config.total, config.ema_decay, config.accum_steps = 4, 0.0, 1
    config.mesh.zero1 = True
    config.model = {"name": f"{__name__}:Plain", "width": 4}
    config.task = {"name": "classification"}
    workdir = str(tmp_path_factory.mktemp("run"))
    notes, records = Notes(), []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("vit_jax.training.run").addHandler(handler)
    outcome = vit_jax.train(config, workdir, callbacks=[notes])
    logging.getLogger("vit_jax.training.run").removeHandler(handler)
    return notes, outcome, workdir, records


def test_a_plain_module_trains_with_one_line_of_warning(trained):
    _, outcome, _, records = trained
    assert isinstance(outcome, Outcome)
    (record,) = records
    line = record.getMessage()
    assert "parameters name no logical axes (backbone/Conv_0/bias, ...)" in line
    assert "8 devices holds all of them" in line
    assert "\n" not in line


def test_callbacks_are_told_of_steps_evaluations_saves_and_the_end(trained):
    notes, outcome, *_ = trained
    assert [entry[1] for entry in notes.told if entry[0] == "step"] == [1, 2, 3, 4]
    assert [entry[1] for entry in notes.told if entry[0] == "save"] == [3, 4]
    found = [entry for entry in notes.told if entry[0] == "evaluate"]
    assert found == [("evaluate", 4, outcome.results["val/accuracy"])]
    assert notes.told[-1] == ("end", outcome)
    assert all(isinstance(entry[2], float) for entry in notes.told if entry[0] == "step")


def test_a_run_is_evaluated_and_used_from_python(trained):
    _, outcome, workdir, _ = trained
    assert vit_jax.evaluate(workdir) == outcome.results
    images = np.zeros((3, 8, 8, 1), np.uint8)
    assert vit_jax.features(workdir, images).shape == (3, 4)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (type("Typo", (), {"on_steps": print})(), "on_steps is no event; did you mean 'on_step'"),
        (print, "has none of the methods on_step, on_evaluate, on_save, on_end"),
    ],
)
def test_a_callback_that_would_never_be_called_is_an_error(callback, message):
    with pytest.raises(UserError, match=message):
        vit_jax.train("never read", "/nowhere", callbacks=[callback])


def test_evaluate_needs_one_model():
    with pytest.raises(UserError, match="give workdir, or config and checkpoint"):
        vit_jax.evaluate()
    with pytest.raises(UserError, match="checkpoint needs config"):
        vit_jax.evaluate(checkpoint="B_16.npz")


def test_models_are_listed_by_pattern():
    assert vit_jax.list_models("vit_s1?") == ["vit_s14", "vit_s16"]
    assert vit_jax.list_models("no such") == []
    assert set(vit_jax.list_models()) == set(vit_jax.models.names())


def test_every_public_name_is_there_and_documented():
    assert dir(vit_jax) == sorted(vit_jax.__all__)
    for name in vit_jax.__all__:
        assert getattr(vit_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = vit_jax.trian
