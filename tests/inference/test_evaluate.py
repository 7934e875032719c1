"""The parameters that `eval` measures, of runs and of files; nothing is computed with them."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from vit_jax import checkpoints, models, optim
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.training import evaluate
from vit_jax.training.workdir import Workdir

IMAGE = ((8, 8, 1), np.uint8)
SMALL = {"model__depth": 0, "model__position": "none"}


@pytest.fixture
def measured(monkeypatch):
    """A list of the parameters that the evaluation is given."""
    found = []
    monkeypatch.setattr(
        evaluate.Evaluator, "run", lambda self, params, **_: found.append(params) or {"val/x": 1.0}
    )
    return found


@pytest.fixture
def averaging(tiny_config):
    return tiny_config(ema_decay=0.0, optim__name="schedule_free_adamw", **SMALL)


@pytest.mark.usefixtures("one_device")
def test_a_run_is_measured_by_what_its_optimizer_averages(
    averaging, left_by_a_run, tmp_path, measured, monkeypatch
):
    def state(params):
        optimizer = optim.build(averaging.optim, params, duration=Duration(9, 1, 1))
        shapes = jax.eval_shape(optimizer.init, params)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    def averaged(self, params, state):
        assert state.keys() == {"schedule_free_adamw"}
        return jax.tree.map(np.negative, jax.device_get(params))

    monkeypatch.setattr(optim.Optimizer, "evaluation_params", averaged)
    params = left_by_a_run(averaging, tmp_path, image=IMAGE, classes=10, state=state)
    assert evaluate.evaluate_workdir(Workdir.open(str(tmp_path)), {}) == {"val/x": 1.0}
    (found,) = measured
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for negative, stored in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(negative, -stored)


def test_a_run_without_the_state_that_averages_is_not_measured(
    averaging, left_by_a_run, tmp_path, measured, one_device
):
    left_by_a_run(averaging, tmp_path, image=IMAGE, classes=10)
    with pytest.raises(UserError, match="the checkpoint of step 1 has no opt_state"):
        evaluate.evaluate_workdir(Workdir.open(str(tmp_path)), {})
    assert not measured


def test_a_file_without_a_head_is_not_measured_with_zeros(
    tiny_config, tmp_path, measured, one_device
):
    config = tiny_config(**SMALL)
    model = models.build(**config.model)
    images = np.zeros((1, 8, 8, 1), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nn.unbox(shapes))
    checkpoints.save(zeros, model, tmp_path / "backbone.npz", "npz")
    with pytest.raises(UserError, match="the head cannot be kept"):
        evaluate.evaluate_checkpoint(config, str(tmp_path / "backbone.npz"))
    assert not measured


@pytest.mark.parametrize("room", [1, 2])
def test_batches_stay_in_memory_only_where_all_of_them_have_room(
    tiny_config, monkeypatch, one_device, room
):
    """30 examples in batches of 16."""
    run = evaluate.Run.build(tiny_config())
    evaluator = evaluate.Evaluator(run.config, run.task, run.abstract, run.mesh)
    (split,) = evaluator.splits
    first = next(iter(evaluator.batches(split)))
    monkeypatch.setattr(evaluate, "CACHE_BYTES", room * sum(x.nbytes for x in first.values()))
    assert len(list(evaluator.batches(split))) == 2
    assert (split.cached is None) == (room < 2)
    assert len(list(evaluator.batches(split))) == 2
