"""Updates of a small tree with made-up gradients, for the optimizer's tests."""

import flax.traverse_util
import jax
import numpy as np
import optax

# Rules that look at more than one element, or at names.
STRUCTURED = ["adafactor", "lamb", "muon", "schedule_free_adamw"]


def gradients(params, seed=1):
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda p: draw(p.shape).astype(np.float32), params)


def run(optimizer, params, steps=3):
    """Parameters and state after a few updates with fixed gradients."""

    @jax.jit
    def apply(grads, state, params, step):
        updates, state = optimizer.update(grads, state, params, step)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for step in range(steps):
        params, state = apply(gradients(params, step), state, params, step)
    return params, state


def one_update(optimizer, params, step=0):
    @jax.jit
    def first(grads, params, step):
        return optimizer.update(grads, optimizer.init(params), params, step)[0]

    return first(gradients(params), params, step)


def assert_trees_close(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")
