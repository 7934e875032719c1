"""Dropout and stochastic depth while training: where they are, how often, and by how much."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vit import IMAGES, tiny

from vit_jax.models.layers import basic, transformer


def traced(model, **kwargs):
    """Traces a training step of a model without computing it."""

    def run(key):
        key, own = jax.random.split(key)
        params = model.init(own, IMAGES)["params"]
        return model.apply({"params": params}, IMAGES, train=True, rngs={"dropout": key}, **kwargs)

    return jax.eval_shape(run, jax.random.key(0))


def test_dropped_branches_are_whole_examples_and_the_others_make_up_for_them():
    x = jnp.ones((1000, 3, 2))
    found = np.asarray(jax.jit(basic.drop_path)(x, 0.25, jax.random.key(0)))
    assert (found == found[:, :1, :1]).all()
    values = found[:, 0, 0]
    np.testing.assert_allclose(np.unique(values), [0, 4 / 3], rtol=1e-6)
    assert (values == 0).mean() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    ("fields", "rates"),
    [({}, [0, 0, 0.2, 0.2, 0.4, 0.4]), ({"constant_drop_path": True}, [0.4] * 6)],
)
def test_the_rate_of_stochastic_depth_grows_to_that_of_the_last_block(fields, rates, monkeypatch):
    """Each block has two branches."""
    model = tiny(depth=3, scan=False, drop_path=0.4, **fields)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES))["params"]
    found = []
    monkeypatch.setattr(transformer, "drop_path", lambda x, rate, key: found.append(rate) or x)

    @jax.jit  # Computes the rates and nothing else.
    def run():
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.unbox(params))
        found.clear()
        rngs = {"dropout": jax.random.key(0)}
        model.apply({"params": zeros}, IMAGES, train=True, rngs=rngs)
        return list(found)

    np.testing.assert_allclose(run(), rates, atol=1e-6)


def test_dropout_is_after_the_positions_and_in_every_block():
    rates = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            rates["/".join(context.module.path)] = context.module.rate
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        traced(tiny(depth=1, scan=False, dropout=0.3, attention_dropout=0.2))
    assert rates == {
        "backbone/Dropout_0": 0.3,  # Of patches with their positions.
        "backbone/blocks_0/Dropout_0": 0.3,  # Of what attention returns.
        "backbone/blocks_0/attn/Dropout_0": 0.2,
        "backbone/blocks_0/mlp/Dropout_0": 0.3,
        "backbone/blocks_0/mlp/Dropout_1": 0.3,
    }


def test_the_mean_of_tokens_is_float32_in_half_precision():
    found = traced(tiny(num_classes=0, pooling="mean", dtype="bfloat16"))
    assert found.pooled.dtype == jnp.float32
