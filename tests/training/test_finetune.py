"""Runs that start from a checkpoint: the first state, freezing, layer-wise decay, adapters."""

import jax
import numpy as np
import pytest

from vit_jax import checkpoints, tasks
from vit_jax.checkpoints.store import Store, flatten
from vit_jax.config import set_key, validate
from vit_jax.errors import UserError
from vit_jax.training import initial_state
from vit_jax.training.loop import train
from vit_jax.training.run import Run


@pytest.fixture
def config_of(tiny_config):
    """`tiny_config` whose keys may also be those of open sections, dots as double underscores."""

    def make(**keys):
        config = tiny_config()
        config.unlock()
        for key, value in keys.items():
            set_key(config, key.replace("__", "."), value)
        return validate(config)

    return make


def random_params(task, seed=0):
    """Parameters of the task's model, none of them zero."""
    random = np.random.default_rng(seed)
    shapes = tasks.abstract_params(task)
    return jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(np.float32), shapes)


@pytest.fixture
def released(tiny_config, tmp_path):
    """A checkpoint as others publish them: (path, its parameters under our names)."""
    task = Run.build(tiny_config()).task
    params = random_params(task)
    path = tmp_path / "released.npz"
    checkpoints.save(params, task.model, path, "npz")
    return str(path), params


def leaves(tree):
    return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


def test_first_state_holds_the_checkpoint_on_any_mesh(released, config_of):
    path, params = released
    config = config_of(
        init__checkpoint=path, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, optim__name="muon"
    )
    run = Run.build(config)
    state, report = initial_state.first_state(run)
    assert not report.initialised
    for name, expected in leaves(params).items():
        np.testing.assert_array_equal(leaves(state.params)[name], expected, err_msg=name)
        np.testing.assert_array_equal(leaves(state.ema)[name], expected, err_msg=name)
    placed = jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, state, run.abstract)
    assert all(jax.tree.leaves(placed))


def test_optimizer_starts_from_the_loaded_parameters(released, config_of):
    """An optimizer that averages parameters must not average the random ones."""
    path, params = released
    config = config_of(init__checkpoint=path, optim__name="schedule_free_adamw", ema_decay=0.0)
    run = Run.build(config)
    state, _ = initial_state.first_state(run)
    published = jax.jit(run.optimizer.evaluation_params)(state.params, state.opt_state)
    for name, expected in leaves(params).items():
        np.testing.assert_allclose(leaves(published)[name], expected, atol=1e-7, err_msg=name)


def test_head_is_kept_or_started_anew(released, config_of):
    path, params = released
    kept, _ = initial_state.first_state(Run.build(config_of(init__checkpoint=path)))
    np.testing.assert_array_equal(kept.params["head"]["kernel"], params["head"]["kernel"])
    zero, report = initial_state.first_state(
        Run.build(config_of(init__checkpoint=path, init__head="zero"))
    )
    assert not np.any(zero.params["head"]["kernel"])
    assert any("head/kernel" in line for line in report.ignored)


def test_frozen_run_keeps_what_was_loaded_and_resumes_without_the_file(
    released, config_of, tmp_path, capsys
):
    path, params = released
    keys = {"init__checkpoint": path, "init__head": "zero", "optim__freeze": ["backbone/.*"]}
    workdir = tmp_path / "probe"
    train(config_of(**keys, total=3), str(workdir))
    shown = capsys.readouterr().err
    assert "arrays loaded as they are" in shown
    assert "initialised: head/kernel" in shown
    (tmp_path / "released.npz").unlink()
    longer = config_of(**keys, total=4)
    train(longer, str(workdir))
    restored = Store(workdir / "checkpoints").restore_newest(Run.build(longer).abstract)
    found = leaves(restored.tree.params)
    for name, before in leaves(params).items():
        assert np.array_equal(found[name], before) == name.startswith("backbone."), name
    with pytest.raises(UserError, match=r"init\.checkpoint: "):
        train(config_of(total=4), str(workdir))


def test_what_is_frozen_costs_no_backward_pass(config_of):
    """A head's gradient takes one product, of what the forward pass left."""

    def products(**keys):
        return Run.build(config_of(**keys)).trace_step().lower().as_text().count("dot_general")

    frozen = products(optim__freeze=["backbone/.*"])
    assert products() > 2 * frozen
    assert frozen > 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init__checkpoint": "/absent.npz"}, "config.init: .*/absent.npz"),
        ({"init__head": "random"}, "config.init.head='random' is unknown"),
        ({"model__width": 32}, "config.init: .*width 16, but yours has 32"),
    ],
)
def test_what_does_not_fit_says_so(released, config_of, keys, message):
    keys = {"init__checkpoint": released[0], **keys}
    with pytest.raises(UserError, match=message) as error:
        initial_state.first_state(Run.build(config_of(**keys)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scan", [True, False])
def test_layer_decay_slows_the_lower_layers(released, config_of, scan):
    """Without momentum an update is -lr · multiplier · gradient."""
    config = config_of(
        init__checkpoint=released[0],
        model__scan=scan,
        optim__name="sgd",
        optim__args__momentum=0.0,
        optim__clip_norm=0.0,
        optim__weight_decay=0.0,
        optim__schedule__name="constant",
        optim__schedule__warmup=0,
        optim__layer_decay=0.5,
        optim__lr=1.0,
    )
    run = Run.build(config)
    state, _ = initial_state.first_state(run)
    ones = jax.tree.map(np.ones_like, jax.device_get(state.params))
    update = jax.jit(run.optimizer.update)
    updates, _ = update(ones, state.opt_state, state.params, state.step)
    blocks = {"blocks": [0.25, 0.5]} if scan else {"blocks_0": 0.25, "blocks_1": 0.5}
    expected = {"patch_embed": 0.125, "cls": 0.125, "pos_embed": 0.125, "norm": 1.0, **blocks}
    for name, found in leaves(updates).items():
        multiplier = np.asarray(expected[name.split(".")[1]] if "backbone" in name else 1.0)
        multiplier = multiplier.reshape(-1, *[1] * (found.ndim - 1))
        np.testing.assert_allclose(found, np.broadcast_to(-multiplier, found.shape), err_msg=name)
