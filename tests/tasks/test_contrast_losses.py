"""Losses over all pairs in chunks over eight devices: equal to the formulas, in little memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.config import default_config
from vit_jax.models import TowerOutputs
from vit_jax.parallel import sharding
from vit_jax.tasks import _contrast

CHUNKED = {"softmax": _contrast.softmax_loss, "sigmoid": _contrast.sigmoid_loss}


def plain(loss, image, text, scale, bias):
    """The formulas of the papers, on the whole matrix."""
    logits = scale * image @ text.T + bias
    if loss == "softmax":
        by_image, by_text = jax.nn.log_softmax(logits, 1), jax.nn.log_softmax(logits, 0)
        return -(jnp.diag(by_image) + jnp.diag(by_text)).sum() / 2
    signs = 2 * jnp.eye(len(image)) - 1
    return -jax.nn.log_sigmoid(signs * logits).sum()


def compiled(loss, chunk, batch, dim, sizes):
    """Value and gradients with the vectors split over a mesh of eight devices, compiled."""
    config = default_config()
    config.mesh.update(sizes)
    mesh = sharding.make_mesh(config.mesh)

    def value(image, text, scale, bias):
        return CHUNKED[loss](TowerOutputs(image, text, scale, bias), chunk)

    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    places = (rows, rows, whole, whole)
    grad = jax.value_and_grad(value, argnums=(0, 1, 2, 3))
    step = jax.jit(grad, in_shardings=places, out_shardings=(whole, places))
    vectors, number = jax.ShapeDtypeStruct((batch, dim), jnp.float32), jnp.float32(0)
    with sharding.activate(mesh):
        return step.lower(vectors, vectors, number, number).compile(), places


@pytest.mark.parametrize("loss", CHUNKED)
@pytest.mark.parametrize(("chunk", "sizes"), [(8, {"data": 8}), (24, {"fsdp": 2, "tensor": 2})])
def test_values_and_gradients_are_those_of_the_whole_matrix(loss, chunk, sizes):
    random = np.random.default_rng(0)
    vectors = random.normal(size=(2, 48, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    arguments = (*vectors, np.float32(7), np.float32(-3))
    run, places = compiled(loss, chunk, 48, 5, sizes)
    found = run(*jax.device_put(arguments, places))
    expected = jax.value_and_grad(functools.partial(plain, loss), argnums=(0, 1, 2, 3))(*arguments)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("loss", "chunk", "least", "most"),
    [("softmax", 256, 0.5, 2.5), ("sigmoid", 256, 0.5, 2.5), ("sigmoid", 4096, 8, 32)],
)
def test_no_device_holds_more_than_a_few_chunks_of_its_rows(loss, chunk, least, most):
    """4,096 pairs: the matrix has 64 MiB, a device's rows of it 8, 256 columns of those 0.5."""
    run, _ = compiled(loss, chunk, 4096, 8, {"data": 8})
    assert least < run.memory_analysis().temp_size_in_bytes / 2**20 < most
