"""Sharpness-aware minimisation: the place of the second gradient, against formula and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from vit_jax.errors import UserError
from vit_jax.training import step
from vit_jax.training.run import Run


def test_it_climbs_by_rho_along_the_gradient(make, params):
    optimizer = make(params, sam_rho=0.3, freeze=["head/.*"])
    grads = jax.tree.map(lambda x: 2 * np.asarray(x) + 1, params)
    found = jax.jit(optimizer.ascend)(params, grads)
    trained = [np.ravel(x) for x in jax.tree.leaves(grads["backbone"])]
    norm = np.linalg.norm(np.concatenate(trained))
    table, slope = params["backbone"]["pos_embed"], grads["backbone"]["pos_embed"]
    np.testing.assert_allclose(
        found["backbone"]["pos_embed"], table + 0.3 * slope / norm, rtol=1e-5
    )
    np.testing.assert_array_equal(found["head"]["kernel"], params["head"]["kernel"])


def test_without_a_gradient_it_stays(make, params):
    zeros = jax.tree.map(np.zeros_like, params)
    found = jax.jit(make(params, sam_rho=0.3).ascend)(params, zeros)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_negative_radius(make, params):
    with pytest.raises(UserError, match=r"sam_rho=-0\.1: write a number, at least 0"):
        make(params, sam_rho=-0.1)


@pytest.mark.usefixtures("one_device")
def test_a_step_is_that_of_optax(tiny_config):
    """Two gradients a step, the second one applied; the loss logged is that of the first."""
    keys = {"accum_steps": 1, "ema_decay": 0.0, "model__dropout": 0.0, "task__mixup": 0.0}
    keys |= {"optim__name": "sgd", "optim__args__momentum": 0.0, "optim__lr": 0.1}
    keys |= {"optim__weight_decay": 0.0, "optim__clip_norm": 0.0, "optim__sam_rho": 0.5}
    keys |= {"optim__schedule__name": "constant", "optim__schedule__warmup": 0}
    keys |= {"model__depth": 0, "model__position": "none"}
    run = Run.build(tiny_config(**keys))
    with run.open_feed(0) as feed:
        batch = jax.device_get(feed.next_batch())
        state = run.make_state()
        params = jax.device_get(state.params)
        after, metrics = run.compile_step()(state, feed._place(batch))

    key = step.random_key(jnp.uint32(0), step.Purpose.AUGMENT, 0)
    perturbed = jax.jit(run.task.augment)(batch, key)

    def loss(params):
        total, count = run.task.loss_fn(params, perturbed, jax.random.key(0))
        return total / count

    theirs = optax.contrib.sam(
        optax.sgd(0.1),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.5)),
        sync_period=2,
        opaque_mode=True,
        reset_state=False,
    )

    @jax.jit
    def reference(params):
        value, grads = jax.value_and_grad(loss)(params)
        updates, _ = theirs.update(
            grads, theirs.init(params), params, grad_fn=lambda p, _: jax.grad(loss)(p)
        )
        return value, optax.apply_updates(params, updates)

    value, expected = reference(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.device_get(after.params),
        expected,
    )
