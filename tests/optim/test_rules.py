"""Rules of our own against optax, and against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from optax.contrib import MuonDimensionNumbers

from vit_jax.errors import UserError
from vit_jax.optim.groups import named_leaves
from vit_jax.optim.rules.adafactor import adafactor
from vit_jax.optim.rules.adamw import adamw
from vit_jax.optim.rules.muon import muon
from vit_jax.optim.rules.sgd import sgd

BLOCKS = r"blocks(?:_(\d+))?/.*"


@pytest.fixture
def two_blocks():
    draw = np.random.default_rng(3).standard_normal
    shapes = {
        "blocks": {
            "attn": {
                "query": {"kernel": (2, 6, 2, 4)},
                "out": {"kernel": (2, 2, 4, 6)},
            },
            "mlp": {"kernel": (2, 6, 10)},
        },
        "head": {"kernel": (6, 3)},
    }
    return jax.tree.map(
        lambda shape: np.asarray(draw(shape), np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def directions(rule, params, steps=3):
    """Directions of a few updates with gradients that vary, as one compiled run gives them."""
    state, update, out = jax.jit(rule.init)(params), jax.jit(rule.update), []
    for step in range(steps):
        grads = jax.tree.map(lambda p, s=step: np.sin((s + 1) * p), params)
        direction, state = update(grads, state, params)
        out.append(direction)
    return out


def train_both(optimizer, theirs, start, steps):
    """(parameters, state) of our optimizer and of optax's after the same gradients."""

    @jax.jit
    def update(ours, expected, grads, step):
        updates, our_state = optimizer.update(grads, ours[1], ours[0], step)
        their_updates, their_state = theirs.update(grads, expected[1], expected[0])
        return (
            (optax.apply_updates(ours[0], updates), our_state),
            (optax.apply_updates(expected[0], their_updates), their_state),
        )

    ours, expected = jax.jit(lambda p: ((p, optimizer.init(p)), (p, theirs.init(p))))(start)
    for step in range(steps):
        grads = jax.tree.map(lambda p, s=step: np.sin((s + 1) * p), start)
        ours, expected = update(ours, expected, grads, step)
    return ours, expected


def assert_same(ours, theirs, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


@pytest.mark.parametrize("nesterov", [False, True])
def test_half_precision_adam_is_optax_compiled(two_blocks, nesterov):
    theirs = optax.scale_by_adam(mu_dtype="bfloat16", nesterov=nesterov)
    ours = adamw(mu_dtype="bfloat16", nesterov=nesterov)
    assert_same(directions(ours, two_blocks), directions(theirs, two_blocks), atol=2e-6)
    assert ours.init(two_blocks).mu["head"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_optax_trace(two_blocks, nesterov):
    theirs = optax.trace(0.9, nesterov)
    assert_same(directions(sgd(nesterov=nesterov), two_blocks), directions(theirs, two_blocks))


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_muon_is_optax_muon(two_blocks, consistent_rms):
    """optax's own, told by hand which axes are in and out."""
    numbers = {
        "blocks": {
            "attn": {
                "query": {"kernel": MuonDimensionNumbers((1,), (2, 3))},
                "out": {"kernel": MuonDimensionNumbers((1, 2), (3,))},
            },
            "mlp": {"kernel": MuonDimensionNumbers((1,), (2,))},
        },
        "head": {"kernel": None},
    }
    theirs = optax.contrib.muon(
        1.0,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=consistent_rms,
    )
    expected = directions(theirs, two_blocks)
    ours = directions(muon(consistent_rms=consistent_rms, blocks=BLOCKS), two_blocks)
    matrices = [jax.tree.map(np.negative, direction["blocks"]) for direction in expected]
    assert_same([direction["blocks"] for direction in ours], matrices)
    heads = directions(optax.scale_by_adam(), two_blocks["head"])
    assert_same([direction["head"] for direction in ours], heads)


def test_muon_makes_each_layers_matrix_orthogonal(two_blocks):
    (direction,) = directions(muon(consistent_rms=None, blocks=BLOCKS), two_blocks, steps=1)
    query = direction["blocks"]["attn"]["query"]["kernel"].reshape(2, 6, 8) / np.sqrt(8 / 6)
    out = direction["blocks"]["attn"]["out"]["kernel"].reshape(2, 8, 6)
    for matrix in (*query, *out):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert 0.5 < values.min() <= values.max() < 1.3, values


def test_muon_without_matrices():
    with pytest.raises(UserError, match="muon finds no kernel"):
        muon(blocks=BLOCKS).init({"head": {"kernel": jnp.ones((2, 2))}})


def test_lamb_is_optax_lamb_on_separate_layers(make, two_blocks):
    layers = [jax.tree.map(lambda p, i=i: p[i], two_blocks["blocks"]) for i in range(2)]
    separate = {"blocks_0": layers[0], "blocks_1": layers[1], "head": two_blocks["head"]}
    theirs = optax.lamb(0.01, weight_decay=0.1)
    optimizer = make(separate, name="lamb", lr=0.01, weight_decay=0.1)
    (ours, _), (expected, _) = train_both(optimizer, theirs, separate, steps=3)
    assert_same(ours, expected)


def test_lamb_may_leave_all_but_kernels_to_adam(make, params):
    def update(name, **args):
        optimizer = make(params, name=name, lr=0.1, args=args)

        def first(params):
            return optimizer.update(
                jax.tree.map(jnp.sin, params), optimizer.init(params), params, 0
            )

        return named_leaves(jax.jit(first)(params)[0])

    ours, lamb = update("lamb", only_kernels=True), update("lamb")
    adam = update("adamw", eps=1e-6)
    for name, leaf in ours.items():
        same_as = lamb if name.endswith("/kernel") else adam
        np.testing.assert_allclose(leaf, same_as[name], rtol=1e-6)


def test_schedule_free_is_optax_schedule_free(make, two_blocks):
    theirs = optax.contrib.schedule_free_adamw(0.02, b1=0.95, weight_decay=0.1)
    optimizer = make(
        two_blocks,
        name="schedule_free_adamw",
        args={"b1": 0.95},
        lr=0.02,
        weight_decay=0.1,
    )
    (ours, our_state), (expected, their_state) = train_both(optimizer, theirs, two_blocks, steps=4)
    assert_same(ours, expected)
    averaged = jax.jit(optax.contrib.schedule_free_eval_params)(their_state, expected)
    assert_same(jax.jit(optimizer.evaluation_params)(ours, our_state), averaged)


def test_adafactor_caps_the_second_moments_decay(two_blocks):
    """A second moment that forgets all but the newest gradient leaves its sign."""
    rule = adafactor(beta2_cap=0.0, min_dim_size_to_factor=100, momentum=0.0, blocks="")
    for step, direction in enumerate(directions(rule, two_blocks)):
        grads = jax.tree.map(lambda p, s=step: np.sin((s + 1) * p), two_blocks)
        assert_same(direction, jax.tree.map(np.sign, grads))


def test_adafactor_clips_each_parameters_update(two_blocks):
    plain, clipped = (
        directions(
            adafactor(clipping_threshold=limit, momentum=0.0, blocks=""), two_blocks, steps=1
        )[0]
        for limit in (0.0, 0.25)
    )
    assert_same(clipped, jax.tree.map(lambda u: u / max(1, np.sqrt(np.mean(u**2)) / 0.25), plain))


def test_rule_named_by_its_import_path(make, two_blocks, monkeypatch):
    import sys
    import types

    module = types.ModuleType("their_package")
    module.signs = lambda scale=1.0: optax.stateless(
        lambda grads, _: jax.tree.map(lambda g: scale * jnp.sign(g), grads)
    )
    monkeypatch.setitem(sys.modules, "their_package", module)
    optimizer = make(two_blocks, name="their_package:signs", args={"scale": 2.0}, lr=0.1)
    updates, state = optimizer.update(two_blocks, optimizer.init(two_blocks), two_blocks, 0)
    assert list(state) == ["signs"]
    assert_same(updates, jax.tree.map(lambda p: -0.2 * jnp.sign(p), two_blocks))
