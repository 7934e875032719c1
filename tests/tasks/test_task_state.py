"""A task's own state: updated in the step, saved, restored, sharded, published."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import checkpoints
from vit_jax import config as config_lib
from vit_jax.checkpoints.store import Store
from vit_jax.errors import UserError
from vit_jax.parallel import sharding
from vit_jax.training import restore
from vit_jax.training.run import Run

STEPS = 4


@pytest.fixture
def taught(tiny_config, monkeypatch):
    """`taught(**keys)`: a config of the task in `own_teacher.py`; dots in keys as `__`."""
    monkeypatch.syspath_prepend(__file__.rsplit("/", 1)[0])

    def make(task="own_teacher:Task", **keys):
        config = tiny_config(total=STEPS, ema_decay=0.0, accum_steps=1, model__depth=1)
        config.unlock()
        config.model.dropout = 0.0
        config.task = {"name": task}
        keys = {"optim__name": "sgd", "optim__lr": 0.05, **keys}
        for key, value in keys.items():
            config_lib.set_key(config, key.replace("__", "."), value)
        return config_lib.validate(config)

    return make


def on_mesh(config, sizes=(1, 1, 1)):
    """The run on the first devices, and its compiled step."""
    devices = jax.devices()[: math.prod(sizes)]
    config.unlock()
    config.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
    run = Run.build(config_lib.validate(config), devices)
    return run, run.compile_step()


def advanced(run, step, state, steps):
    """The state after some more steps, the logged center norms, and the next batch."""
    norms = []
    with run.open_feed(int(state.step)) as feed:
        for _ in range(steps):
            state, metrics = step(state, feed.next_batch())
            norms.append(float(metrics["center_norm"]))
        return state, norms, feed.next_batch()


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def test_the_state_follows_the_steps_on_every_mesh_and_resumes_bit_for_bit(taught, tmp_path):
    run, step = on_mesh(taught())
    assert run.task.pull_from == 2
    state, norms, _ = advanced(run, step, run.make_state(), 2)
    assert norms == [0, 0]  # A head starts at zero, and its first answers are zeros.
    with Store(tmp_path) as store:
        store.save(2, state, {})
        store.wait()
        kept = jax.tree.map(jnp.copy, state)  # The step reuses the memory of its argument.
        whole, norms, _ = advanced(run, step, kept, 2)
        assert norms[-1] > 0
        again, restored, _ = restore.restore_or_init(run, store)
        assert not restored.missing
        again, *_ = advanced(run, step, again, 2)
        assert_equal(again, whole)
        store.save(4, again, {})
    # The teacher is what is evaluated, and what leaves the workdir.
    assert run.evaluation_params(whole) is whole.task_state["teacher"]
    loaded = checkpoints.load(tmp_path, run.task.model, image_size=8, channels=1)
    assert_equal(loaded, whole.task_state["teacher"])
    with pytest.raises(AssertionError):
        assert_equal(loaded, whole.params)
    check_mesh(taught, whole)


def check_mesh(taught, alone):
    run, step = on_mesh(taught(accum_steps=2, mesh__zero1=True), (2, 2, 2))
    meshed, _, batch = advanced(run, step, run.make_state(), STEPS)
    for name in ("params", "task_state"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=3e-6),
            jax.device_get(getattr(meshed, name)),
            jax.device_get(getattr(alone, name)),
        )
    teacher, params = meshed.task_state["teacher"], meshed.params
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, teacher, params))
    assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(teacher))
    # A skipped step leaves the state alone.
    before = jax.device_get(meshed.task_state)
    head = {**params["head"], "bias": jnp.full_like(params["head"]["bias"], jnp.nan)}
    bad, metrics = step(meshed.replace(params={**params, "head": head}), batch)
    assert int(metrics["bad_steps"]) == 1
    assert_equal(bad.task_state, before)


def test_a_state_that_the_checkpoint_lacks_starts_from_its_parameters(taught, tmp_path, one_device):
    run = Run.build(taught())
    saved = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), run.abstract)
    with Store(tmp_path / "checkpoints") as store:
        store.save(2, saved.replace(task_state=None), {})
        store.wait()
        state, restored, _ = restore.restore_or_init(run, store)
    assert "task_state.center" in restored.missing
    assert all(float(x.min()) == 1 for x in jax.tree.leaves(state.task_state["teacher"]))
    assert float(state.task_state["center"].max()) == 0
    assert Run.build(taught("classification")).abstract.task_state is None


def test_a_second_average_of_the_parameters_is_refused(taught, one_device):
    with pytest.raises(UserError, match=r"ema_decay=0.9: task.name='own_teacher:Task' averages"):
        Run.build(taught(ema_decay=0.9))
    with pytest.raises(UserError, match="both average the parameters"):
        Run.build(taught(optim__name="schedule_free_adamw"))


def test_adapters_teach_merged_models(taught, one_device):
    run = Run.build(taught(task__lora={"rank": 1}, optim__sam_rho=0.05))
    assert run.task.pull_from == 2
    assert "lora" in run.abstract.params
    assert "lora" not in run.abstract.task_state["teacher"]
    run.trace_step()
