"""Trajectories of the reference code, retraced by the train step of this package."""

import dataclasses

import jax
import numpy as np

from vit_jax import optim, tasks
from vit_jax.optim.groups import named_leaves
from vit_jax.parallel import sharding
from vit_jax.training import step as step_lib
from vit_jax.types import ArraySpec, DataInfo


def info(image):
    """The data of a run on float images `[height, width, channels]` that are normalized already."""
    return DataInfo({"image": ArraySpec(tuple(image), np.dtype(np.float32))}, 0)


def given(task):
    """The task with batches that need no augmentation, because the reference drew their masks."""
    own = type("Given", (type(task),), {"augment": lambda self, batch, key: dict(batch)})
    return own(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task) if f.init})


class Steps:
    """The train step on one device, from given parameters.

    optimizer: `config.optim`. teacher: parameters of the teacher; None leaves the task's own state.
    """

    def __init__(self, task, params, optimizer, total, teacher=None):
        mesh = sharding.data_mesh(jax.devices()[:1])
        boxed = tasks.boxed_params(task)
        built = optim.build(optimizer, params, duration=lambda d, *_: d, total_steps=total)
        _, abstract = step_lib.init_state(task, built, boxed, seed=0, ema=False, mesh=mesh)
        arrays = jax.tree.map(jax.numpy.array, params)
        expected = {name: x.shape for name, x in named_leaves(abstract.params).items()}
        assert {name: x.shape for name, x in named_leaves(arrays).items()} == expected
        state = step_lib.State(
            step=jax.numpy.int32(0),
            seed=jax.numpy.uint32(0),
            params=arrays,
            opt_state=built.init(arrays),
            ema=None,
            bad_steps=jax.numpy.int32(0),
        )
        if teacher is not None:
            own = step_lib.first_task_state(task, arrays, 0)
            state = state.replace(task_state={**own, "teacher": teacher})
        self.state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
        self._run = step_lib.make_train_step(task, built, abstract, mesh)

    def __call__(self, batch):
        """Makes one step and returns its metrics."""
        self.state, metrics = self._run(self.state, batch)
        return metrics
