"""Every implementation of attention computes the same, and runs where it can."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vit import IMAGES, apply, init, tiny

from vit_jax.errors import UserError
from vit_jax.models.layers.attention import attend


def loss_and_gradients(attention):
    """Shapes of blocks, with many queries and keys, and of a probe with one query."""
    model = tiny(pooling="map", attention=attention)
    params = init(tiny(pooling="map"))
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.apply({"params": p}, IMAGES) ** 2)))(
        params
    )


def test_splash_attention_gives_the_same_logits_and_gradients():
    (value, grads), (expected, expected_grads) = map(loss_and_gradients, ("splash", "xla"))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), grads, expected_grads
    )


def test_heads_first_gives_the_same_logits_and_gradients():
    (value, grads), (expected, expected_grads) = map(loss_and_gradients, ("heads_first", "xla"))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    # Sums in another order: relative to the largest of each gradient.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * abs(b).max() + 1e-6),
        grads,
        expected_grads,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(
    num_queries=st.integers(1, 9),
    num_keys=st.integers(1, 9),
    num_segments=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=4, deadline=None)
def test_heads_first_is_attention(dtype, num_queries, num_keys, num_segments, seed):
    """float32 to 2e-6; bfloat16, whose results are rounded to 8 bits, to two of their steps."""
    random = np.random.default_rng(seed)
    draw = partial(random.standard_normal, dtype=np.float32)
    query, *pair = (draw((2, n, 3, 4)).astype(dtype) for n in (num_queries, num_keys, num_keys))
    segments = None
    if num_segments:  # Every query's segment has a key.
        keys = random.integers(0, num_segments, (2, num_keys))
        queries = random.permuted(np.tile(keys, num_queries), axis=1)[:, :num_queries]
        segments = queries.astype(np.int32), keys.astype(np.int32)

    def run(implementation):
        def loss(*arrays):
            y = attend(*arrays, segments, implementation=implementation)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, *pair)
        return [y, *gradients]

    tolerance = {"float32": 2e-6, "bfloat16": 2**-6}[dtype]
    for ours, plain in zip(run("heads_first"), run("xla"), strict=True):
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
        expected = np.asarray(plain, np.float32)
        atol = tolerance * max(1.0, abs(expected).max())
        np.testing.assert_allclose(np.asarray(ours, np.float32), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("num_heads", [2, 1])
def test_splash_attention_on_a_mesh(num_heads):
    """One head cannot be split over two devices, and is not."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    fields = {"num_heads": num_heads, "depth": 1}
    images = np.concatenate([IMAGES, IMAGES])
    params = init(tiny(**fields), images)
    expected = apply(tiny(attention="xla", **fields), params, images)
    with jax.set_mesh(mesh), nn.logical_axis_rules([("batch", "data"), ("heads", "tensor")]):
        actual = apply(tiny(attention="splash", **fields), params, images)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_attention_weights_are_sown_only_when_asked_for(scan):
    model = tiny(pooling="map", scan=scan, attention="splash")
    params = init(model)
    logits, seen = apply(model, params, mutable=["intermediates"])
    backbone = seen["intermediates"]["backbone"]
    probe = backbone["map_head"]["attn"]["attention"][0]
    assert probe.shape == (2, 2, 1, 12)
    if scan:
        weights = backbone["blocks"]["attn"]["attention"][0]
        assert weights.shape == (2, 2, 2, 12, 12)
    else:
        weights = backbone["blocks_1"]["attn"]["attention"][0]
        assert weights.shape == (2, 2, 12, 12)
    np.testing.assert_allclose(np.sum(weights, axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(logits, apply(model, params), rtol=1e-4, atol=1e-5)
    assert "intermediates" not in jax.eval_shape(model.init, jax.random.key(0), IMAGES)


def test_cudnn_is_refused_where_it_cannot_run():
    model = tiny(attention="cudnn")
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)


def test_cudnn_is_taken_where_it_can_train(monkeypatch):
    """On a GPU, not for masked attention over odd lengths, whose gradient it lacks."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    taken = []

    def fused(query, *_, **__):
        taken.append(query.shape[1])
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    for length in (6, 7):
        x = jnp.zeros((1, length, 2, 8), jnp.bfloat16)
        ids = jnp.zeros((1, length), jnp.int32)
        attend(x, x, x)
        attend(x, x, x, (ids, ids))
    assert taken == [6, 6, 7]
    with pytest.raises(UserError, match="a masked length must be even; write attention='auto'"):
        attend(x, x, x, (ids, ids), implementation="cudnn")
