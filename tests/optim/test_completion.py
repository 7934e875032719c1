"""The optimizer's state for parameters that were frozen before, or of which it knows too little."""

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optimizer import RULES
from toy_updates import assert_trees_close, flat

from vit_jax import optim


def restored(state, like):
    """`state` in the form of `like`, with None for what it lacks, as a store restores it."""
    found = flat(flax.serialization.to_state_dict(state))
    wanted = flat(flax.serialization.to_state_dict(like))
    named = {
        name: found[name] if name in found and found[name].shape == leaf.shape else None
        for name, leaf in wanted.items()
    }
    return flax.serialization.from_state_dict(
        like, flax.traverse_util.unflatten_dict(named, sep="/")
    )


@pytest.mark.parametrize("name", RULES)
def test_what_was_frozen_starts_as_in_a_new_run(make, params, name):
    """With the count of the others, moments of zero would pass for the averages of many steps."""
    before = make(params, name=name, freeze=["head/.*"])
    fresh = make(params, name=name).init(params)
    state, anew = optim.complete(restored(full(before.init(params)), fresh), fresh, params)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    if name == "sgd":
        assert anew == ()
        momentum = flat(state["sgd"].mu)
        assert {path: bool(np.all(x == 900)) for path, x in momentum.items()} == {
            path: not path.startswith("head") for path in momentum
        }
    else:
        assert anew == (name,)
        assert_trees_close(state, fresh, rtol=0)


def full(state):
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 900, leaf.dtype), state)


def test_first_steps_are_no_larger_than_the_rate(make):
    params = {"head": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}}
    optimizer = make(params, lr=0.1)
    fresh = optimizer.init(params)
    state = restored(full(make(params, freeze=["head/.*"]).init(params)), fresh)
    state, _ = optim.complete(state, fresh, params)
    updates, _ = jax.jit(optimizer.update)(params, state, params, 900)
    assert all(np.allclose(x, -0.1, rtol=1e-4) for x in jax.tree.leaves(updates))


def test_a_state_that_lacks_nothing_is_left_alone(make, params):
    fresh = make(params).init(params)
    state = full(fresh)
    found, anew = optim.complete(state, fresh, params)
    assert anew == ()
    assert_trees_close(found, state, rtol=0)


def test_parameters_with_a_count_of_their_own_leave_the_others_alone(make, params):
    """This is how `freeze_until` begins late parts in the middle of a run."""
    before = make(params, freeze=["head/.*"]).init(params)
    fresh = make(params, freeze_until=[["head/.*", 2]]).init(params)
    found, anew = optim.complete(restored(full(before), fresh), fresh, params)
    assert anew == ()
    assert int(found["adamw"].count) == 900
    assert int(found["adamw_late0"].count) == 0
