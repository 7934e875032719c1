"""A run that is resumed with another config: what it restores is exact, or one line tells."""

import dataclasses

import jax
import numpy as np
import pytest

from vit_jax.checkpoints.store import Store, flatten
from vit_jax.errors import UserError
from vit_jax.training import restore
from vit_jax.training.opening import opening_lines
from vit_jax.training.run import Run
from vit_jax.training.workdir import Workdir

BASE = {"model__depth": 0, "model__position": "none", "optim__freeze": ["head/kernel"]}
STEP = 3
MOMENTS = "opt_state.adamw"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, digits_npz):
    """The workdir of a run on one device, each of whose arrays is full of threes."""
    path = tmp_path_factory.mktemp("saved")
    config = tiny(digits_npz)
    run = Run.build(config, jax.devices()[:1])
    workdir = Workdir.open(str(path))
    workdir.write_config(config, run.task.info, "accuracy", {})
    with Store(workdir.checkpoints) as store:
        state = jax.tree.map(lambda leaf: np.full(leaf.shape, 3, leaf.dtype), run.abstract)
        store.save(STEP, state, {})
    return workdir


def tiny(digits_npz, **keys):
    from vit_jax import config as config_lib

    config = config_lib.load(f"tests/tiny.py:npz={digits_npz}")
    config.unlock()
    for key, value in {**BASE, **keys}.items():
        config_lib.set_key(config, key.replace("__", "."), value)
    return config_lib.validate(config)


def resumed(workdir, config, devices=1):
    """The state, by name, and the lines that a run of `config` prints first."""
    changed = workdir.check_resume(config)
    run = Run.build(config, jax.devices()[:devices])
    with Store(workdir.checkpoints) as store:
        state, found, _ = restore.restore_or_init(run, store)
    restore.check_start(workdir, found, run.duration.total)
    assert jax.tree.structure(state) == jax.tree.structure(run.abstract)
    for array, like in zip(jax.tree.leaves(state), jax.tree.leaves(run.abstract), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (like.shape, like.dtype, like.sharding)
    lines = opening_lines(run, found, None, changed)
    return flatten(state), [line for line in lines if line.startswith("warning")]


@pytest.mark.parametrize(
    ("keys", "told", "new"),
    [
        ({}, [], ()),
        ({"mesh__fsdp": 2, "mesh__zero1": True}, [], ()),
        ({"model__dtype": "bfloat16"}, ["model.dtype: None → 'bfloat16'"], ()),
        ({"precision": "high"}, ["precision: 'default' → 'high'"], ()),
        ({"total": 40}, ["total: 12 → 40"], ()),
        ({"total": 5}, ["total: 12 → 5"], ()),
        ({"ema_decay": 0.0}, ["ema_decay: 0.9 → 0.0"], ()),
        ({"optim__args__mu_dtype": "bfloat16"}, ["optim.args.mu_dtype"], ()),
        ({"optim__freeze": ["head/.*"]}, ["optim.freeze"], ()),
        ({"optim__freeze": []}, ["optim.freeze", "started fresh: 2", "all moments of adamw"],
         (MOMENTS,)),
        ({"optim__freeze": [], "optim__freeze_until": [["head/kernel", 2]]},
         ["optim.freeze", "optim.freeze_until", "started fresh: 3"], (f"{MOMENTS}_late0",)),
        ({"spikes__factor": 2.0}, ["spikes.factor", "started fresh: 4"], ("losses",)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)  # fmt: skip
def test_what_changes_is_exact_or_told(saved, digits_npz, keys, told, new):
    state, lines = resumed(
        saved, tiny(digits_npz, **keys), devices=2 if "mesh__fsdp" in keys else 1
    )
    for name, array in state.items():
        is_new = any(name.startswith(f"{part}.") for part in new)
        assert (np.asarray(array) == (0 if is_new else 3)).all(), name
    assert len(lines) == len(told), lines
    assert all(text in line for text, line in zip(told, lines, strict=True)), lines


def test_a_total_that_is_past_is_refused(saved, digits_npz):
    with pytest.raises(UserError, match=r"is at step 3, and config\.total=2 ends before it"):
        resumed(saved, tiny(digits_npz, total=2))


def test_what_follows_from_parameters_starts_from_those_of_the_checkpoint(
    saved, digits_npz, tmp_path
):
    """The average, and the sequence of Schedule-Free that is no gradient's place."""
    config = tiny(digits_npz, mesh__data=2, mesh__zero1=True)
    run = Run.build(config, jax.devices()[:2])
    free = tiny(digits_npz, ema_decay=0.0, optim__name="schedule_free_adamw")
    with Store(tmp_path) as store:
        state = jax.tree.map(lambda leaf: np.full(leaf.shape, 3, leaf.dtype), run.abstract)
        store.save(STEP, state.replace(ema=None), {})
        store.wait()
        state, restored, _ = restore.restore_or_init(run, store)
        other, _, _ = restore.restore_or_init(Run.build(free, jax.devices()[:1]), store)
    assert {name.partition(".")[0] for name in restored.missing} == {"ema"}
    for found, wanted in zip(
        jax.tree.leaves(state.ema), jax.tree.leaves(run.abstract.ema), strict=True
    ):
        assert (np.asarray(found) == 3).all()
        assert found.sharding == wanted.sharding
    z = other.opt_state["schedule_free_adamw"].z
    assert all((np.asarray(leaf) == 3).all() for leaf in jax.tree.leaves(z))
    assert jax.tree.leaves(z)


def test_a_checkpoint_without_its_step_is_refused(saved, digits_npz, tmp_path):
    run = Run.build(tiny(digits_npz), jax.devices()[:1])
    with Store(tmp_path) as store:
        state = jax.tree.map(lambda leaf: np.full(leaf.shape, 3, leaf.dtype), run.abstract)
        store.save(STEP, dataclasses.replace(state, step=None), {})
        store.wait()
        with pytest.raises(UserError, match="the checkpoint of step 3 has no step"):
            restore.restore_or_init(run, store)
