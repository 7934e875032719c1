"""Exponential moving average of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_updates import flat, run

from vit_jax.errors import UserError
from vit_jax.optim import ema_update
from vit_jax.training.run import Run


def test_warm_up_and_long_run():
    """Decays 1/10, 2/11, 3/12, ... up to the limit, here 0.32, and from then on that."""
    ema, expected = {"w": jnp.zeros(3)}, 0.0
    update = jax.jit(ema_update, static_argnums=3)
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13, 0.32, 0.32]):
        target = 1.0 + step
        expected = decay * expected + (1 - decay) * target
        ema = update(ema, {"w": jnp.full(3, target)}, step, 0.32)
        np.testing.assert_allclose(ema["w"], expected, rtol=1e-6)


def test_equal_parameters_stay_bit_for_bit():
    params = {"w": jnp.linspace(-1e-3, 3.0, 101)}
    assert np.array_equal(ema_update(params, params, 7, 0.9999)["w"], params["w"])


def test_average_keeps_its_own_dtype():
    ema = ema_update({"w": jnp.zeros(2)}, {"w": jnp.ones(2, jnp.bfloat16)}, 0, 0.9)
    assert ema["w"].dtype == jnp.float32


def test_what_schedule_free_averages_leaves_frozen_parameters_alone(make, params):
    optimizer = make(params, name="schedule_free_adamw", lr=0.1, freeze=["head/.*"])
    params, state = run(optimizer, params)
    averaged = flat(jax.jit(optimizer.evaluation_params)(params, state))
    assert any(name.startswith("head/") for name in averaged)
    for name, before in flat(params).items():
        assert np.array_equal(averaged[name], before) == name.startswith("head/"), name


def test_an_average_of_what_averages_itself_is_refused(tiny_config):
    config = tiny_config(optim__name="schedule_free_adamw", ema_decay=0.9)
    with pytest.raises(UserError, match=r"config\.ema_decay=0\.9: .* averages .* itself; write 0"):
        Run.build(config)
