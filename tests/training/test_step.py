"""One step by itself: its random keys, its average of the parameters, and bad losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import optim
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.parallel import sharding
from vit_jax.tasks import BaseTask
from vit_jax.training import run, step

SEED = 3


def words(key):
    return jax.random.key_data(key)


def number(key):
    """The first bits of a key, as many as a float32 holds."""
    return (words(key)[0] >> 8).astype(jnp.float32)


class Keys(BaseTask):
    """A loss of two lines, which tells which keys the step gives to the task.

    The gradient of `w` is `slope`. That of `v` is not a number where `v` and `off` are 0.
    """

    headline = "loss"
    eval_sums = metrics = predict = None

    def init(self, key):
        return {"w": jnp.array([1.0, 2.0]), "v": jnp.zeros(1), "key": number(key)[None]}

    def init_state(self, params, key):
        return {"words": words(key)}

    def augment(self, batch, key):
        return {**batch, "words": words(key)[None]}

    def step_metrics(self, task_state, batch):
        return {"augment": batch["words"][0]}

    def loss_fn(self, params, batch, key):
        root = jnp.sqrt(jnp.abs(params["v"] + batch["off"])).sum()
        loss = (params["w"] * batch["slope"][0]).sum() + root + batch["more"].sum()
        return loss + batch["by_key"].sum() * number(key), jnp.float32(1)


@pytest.fixture(scope="module")
def made():
    """`(make_state, step)` of gradient descent with rate 1 and an average, on one device."""
    task = Keys(None, None)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    keys = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "args": {"momentum": 0.0}}
    keys["schedule"] = {"name": "constant"}
    optimizer = optim.build(keys, shapes, duration=Duration(9, 1, 1))
    make_state, abstract = step.init_state(task, optimizer, shapes, seed=SEED, ema=True, mesh=mesh)
    jitted = step.make_train_step(
        task, optimizer, abstract, mesh, ema_decay=0.9, max_skipped_steps=1
    )
    return make_state, jitted


def batch(slope=(0.5, 1.0), off=1.0, more=0.0, by_key=0.0):
    named = {"slope": [slope], "off": [off], "more": [more], "by_key": [by_key]}
    return {name: np.array(value, np.float32) for name, value in named.items()}


def folded(purpose, at):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), purpose), at)


def test_the_keys_of_a_step_are_those_of_seed_purpose_and_step(made):
    """The numbers are part of every recorded run: 0 begins, 1 augments, 2 drops."""
    make_state, train_step = made
    state = make_state()
    assert float(state.params["key"][0]) == float(number(folded(0, 0)))
    np.testing.assert_array_equal(state.task_state["words"], words(folded(0, 1)))
    for at in (0, 1):
        state, found = train_step(state, batch(slope=(0, 0), off=0.25, by_key=1.0))
        np.testing.assert_array_equal(found["augment"], words(folded(1, at)))
        root = 0.5 if at == 0 else np.sqrt(0.75)  # The first update makes v -1.
        assert abs(float(found["loss"]) - float(number(folded(2, at))) - root) <= 1


def test_the_average_takes_in_the_updated_parameters_from_the_first_step_on(made):
    """The weights of the average before are (1 + t) / (10 + t): 1/10, then 2/11."""
    make_state, train_step = made
    state, _ = train_step(make_state(), batch())
    np.testing.assert_allclose(state.params["w"], [0.5, 1.0])
    np.testing.assert_allclose(state.ema["w"], [0.55, 1.1], rtol=1e-6)
    state, _ = train_step(state, batch())
    np.testing.assert_allclose(state.params["w"], [0.0, 0.0])
    np.testing.assert_allclose(state.ema["w"], [0.1, 0.2], rtol=1e-6)


@pytest.mark.parametrize("bad", [{"off": 0.0}, {"more": np.inf}], ids=["gradient", "loss"])
def test_a_loss_or_a_gradient_that_is_not_finite_changes_nothing(made, bad):
    """Either alone is enough."""
    make_state, train_step = made
    before = jax.device_get(make_state())
    after, found = train_step(make_state(), batch(**bad))
    assert np.isfinite(found["loss"]) == ("off" in bad)
    assert np.isfinite(found["grad_norm"]) == ("more" in bad)
    assert (int(after.step), int(after.bad_steps)) == (1, 1)
    after = jax.device_get(after.replace(step=before.step, bad_steps=before.bad_steps))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.usefixtures("one_device")
def test_contact_sheets_show_the_batch_that_the_step_trains_on(tiny_config):
    """The batch of step 3, augmented with the key of that step."""
    made = run.Run.build(tiny_config(seed=SEED))
    made = dataclasses.replace(made, task=Keys(None, None))
    seen = made.batches_seen(3)
    shown = next(seen)
    seen.close()
    with run.host_batches(made.config, made.source, start_step=3) as batches:
        read = next(iter(batches))
    np.testing.assert_array_equal(shown["image"], read["image"])
    np.testing.assert_array_equal(shown["words"][0], words(folded(1, 3)))


def test_a_metric_of_the_tasks_own_does_not_hide_one_of_every_step():
    assert step._with_own({"loss": 1}, {"entropy": 2}) == {"loss": 1, "entropy": 2}
    with pytest.raises(UserError, match="step_metrics have 'loss', which every step logs"):
        step._with_own({"loss": 1}, {"loss": 2})
