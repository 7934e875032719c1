"""Products whose precision matters ask for it themselves, whatever JAX does by default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.inference.linear_probe import Probes
from vit_jax.models import TowerOutputs, lora
from vit_jax.models.layers.attention import attention_weights
from vit_jax.models.layers.resize import resize_position_table
from vit_jax.tasks.losses import prototypes, vectors

ROWS = jnp.ones((4, 3))
IN_FULL = {
    "pairs of images and texts": lambda: TowerOutputs(None, None, 1.0, 0.0).logits(ROWS, ROWS),
    "adapters": lambda: lora._product(jnp.ones((4, 2)), jnp.ones((2, 3)), 2),
    "positions": lambda: resize_position_table(jnp.ones((1, 4, 3)), (2, 2), (3, 3)),
    "centers": lambda: prototypes.updated_center(jnp.zeros(3), ROWS),
    "neighbors": lambda: vectors.nearest_others(ROWS),
    "probes": lambda: Probes((1.0,)).logits(
        {"kernel": jnp.ones((1, 3, 2)), "bias": jnp.zeros((1, 2))}, ROWS
    ),
}


@pytest.mark.parametrize("function", IN_FULL.values(), ids=IN_FULL)
def test_products_are_in_full_float32(function):
    with jax.default_matmul_precision(None):
        program = jax.jit(function).lower().as_text()
    products = program.count("stablehlo.dot_general")
    assert products
    assert program.count("precision = [HIGHEST, HIGHEST]") == products


def test_logits_of_attention_in_half_precision_are_float32():
    """At 100, bfloat16 would round them to steps of a half."""
    query = jnp.array([20, 1, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    key = jnp.zeros((1, 3, 1, 4), jnp.bfloat16)
    key = key.at[0, :, 0, :2].set(jnp.array([[10, 0.5], [10, 1], [10, -1]], jnp.bfloat16))
    weights = np.asarray(attention_weights(query, key))[0, 0, 0]
    logits = np.array([100.25, 100.5, 99.5])
    expected = np.exp(logits - 100.5) / np.exp(logits - 100.5).sum()
    np.testing.assert_allclose(weights, expected, atol=1e-3)
