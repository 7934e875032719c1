"""A task from outside the package trains and evaluates through the same loop."""

import pytest

from vit_jax import config as config_lib
from vit_jax.checkpoints.store import Store
from vit_jax.errors import UserError
from vit_jax.tracking import read_metrics
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


def test_the_lowest_is_kept_where_an_own_task_says_that_lower_is_better(regress, tmp_path):
    regress.unlock()
    regress.checkpoint.keep_best, regress.checkpoint.keep_last = "val/rmse", 1
    regress.eval.every, regress.optim.lr, regress.total = 1, 0.3, 8
    outcome = train(config_lib.validate(regress), str(tmp_path))
    rmse = {row["step"]: row["eval/val/rmse"] for row in read_metrics(tmp_path) if row["step"]}
    best = min(rmse, key=rmse.get)
    assert best < 8  # Else the newest would be kept anyhow.
    assert Store(tmp_path / "checkpoints").steps() == [best, 8]
    assert outcome.describe().count("%") == 0  # A rank correlation is no percentage.


def test_an_own_task_that_declares_nothing_is_asked_for_the_direction(
    regress, tmp_path, monkeypatch
):
    import regression

    monkeypatch.delattr(regression.Task, "metric_info")
    regress.unlock()
    regress.checkpoint.keep_best = "val/rmse"
    with pytest.raises(UserError, match="best_is=highest or lowest"):
        train(config_lib.validate(regress), str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()
