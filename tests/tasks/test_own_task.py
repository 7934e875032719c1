"""A task from outside the package trains and evaluates through the same loop."""

import pytest

from vit_jax import config as config_lib
from vit_jax.training import evaluate
from vit_jax.training.loop import train
from vit_jax.training.workdir import Workdir


@pytest.fixture
def regress(tiny_config, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rsplit("/", 1)[0])
    config = tiny_config(total=6)
    config.unlock()
    config.task = {"name": "regression:Task", "scale": 9.0}
    return config_lib.validate(config)


def test_an_own_task_takes_the_whole_way(regress, tmp_path):
    outcome = train(regress, str(tmp_path))
    assert outcome.headline[0] == "val_ema/rank_correlation"
    assert outcome.results["val/num_examples"] == 30
    # Examples, not batches, are what metrics see: the last batch of each size is part padding.
    again = evaluate.evaluate_workdir(Workdir.existing(str(tmp_path)), {"eval.batch_size": "32"})
    for name, value in outcome.results.items():
        assert again[name] == pytest.approx(value, rel=1e-5), name
