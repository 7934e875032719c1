"""S/16 is the program of the paper and nothing else, whatever fields the models have."""

import collections
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from vit_jax import models

IMAGES = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)

LAYOUT = frozenset({"reshape", "broadcast_in_dim", "transpose", "squeeze", "copy", "slice", "pad"})
"""Operations that only say where numbers are."""


def norm(x, params):
    return nn.LayerNorm(epsilon=1e-6).apply({"params": params}, x)


def dense(x, params, num_in=1):
    axes = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))
    y = jax.lax.dot_general(x, params["kernel"], (axes, ((), ())))
    bias = params["bias"]
    return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def block(x, params):
    """One block of Dosovitskiy et al. 2021, equations 2 and 3, `[batch, tokens, width]`."""
    y, attention = norm(x, params["norm1"]), params["attn"]
    query, key, value = (dense(y, attention[part]) for part in ("query", "key", "value"))
    query = query / math.sqrt(query.shape[-1])
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    summed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), value)
    x = x + dense(summed, attention["out"], num_in=2)
    y = dense(norm(x, params["norm2"]), params["mlp"]["dense1"])
    return x + dense(jax.nn.gelu(y), params["mlp"]["dense2"]), None


def plain(params, images):
    """The whole model, written down in one piece."""
    backbone = params["backbone"]
    batch, side, _, channels = images.shape
    patches = images.reshape(batch, side // 16, 16, side // 16, 16, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, 16 * 16 * channels)
    kernel = backbone["patch_embed"]["kernel"]
    x = patches @ kernel.reshape(-1, kernel.shape[-1]) + backbone["patch_embed"]["bias"][None, None]
    x = x + backbone["pos_embed"][:, 1:]
    first = backbone["cls"] + backbone["pos_embed"][:, :1]
    x = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, x.shape[-1])), x], axis=1)
    x, _ = jax.lax.scan(block, x, backbone["blocks"])
    x = norm(x, backbone["norm"])[:, 0]
    return x @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, -1)


def operations(function, *inputs):
    """Counts the operations on large arrays by their name and the shape of their result."""
    found = collections.Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            inner = [*jaxprs_in_params(equation.params)]
            for one in inner:
                walk(one)
            name, shape = equation.primitive.name, equation.outvars[0].aval.shape
            if not inner and name not in LAYOUT and math.prod(shape) > 999:
                found[name, shape] += 1

    walk(jax.make_jaxpr(function)(*inputs).jaxpr)
    return found


@pytest.mark.parametrize("gradient", [False, True])
def test_the_operations_are_those_of_the_paper(gradient):
    model = models.build("vit_s16", num_classes=1000)
    boxed = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]

    def ours(params, images):
        return model.apply({"params": params}, images, train=gradient)

    functions = [ours, plain]
    if gradient:
        functions = [jax.grad(lambda p, x, f=f: jnp.square(f(p, x)).sum()) for f in functions]
    counted = [operations(f, nn.meta.unbox(boxed), IMAGES) for f in functions]
    assert counted[0] == counted[1]
    assert sum(n for (name, _), n in counted[0].items() if name == "dot_general") > 8


def test_the_numbers_are_those_of_the_paper():
    sizes = {"depth": 1, "width": 8, "num_heads": 2, "num_classes": 3}
    model = models.build("vit_s16", head_zero_init=False, **sizes)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    params = nn.meta.unbox(model.init(jax.random.key(0), images)["params"])
    expected = plain(params, images)
    np.testing.assert_allclose(model.apply({"params": params}, images), expected, atol=1e-5)
