"""Workdirs as training leaves them, in no time."""

import jax
import numpy as np
import pytest

from vit_jax import tasks
from vit_jax.checkpoints.store import Store
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec, DataInfo

LABEL = {"label": ArraySpec((), np.dtype(np.int32))}


@pytest.fixture
def left_by_a_run():
    """Writes a workdir with random parameters, and returns the parameters.

    image: shape and dtype of the run's images. fields: what else its batches have. classes: their
    number, or their names. state: that of the optimizer, made from the parameters.
    """

    def make(
        config, path, *, image=((8, 8, 3), np.uint8), fields=LABEL, classes=3, state=lambda _: {}
    ):
        names = None if isinstance(classes, int) else tuple(classes)
        spec = {"image": ArraySpec(image[0], np.dtype(image[1])), **fields}
        info = DataInfo(spec, len(names) if names else classes, names)
        workdir = Workdir.open(str(path))
        workdir.write_config(config, info, headline="accuracy", metric_info={})
        shapes = tasks.abstract_params(tasks.build(config.task, config.model, info))
        random = np.random.default_rng(0)
        params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)
        store = Store(workdir.checkpoints)
        store.save(1, {"params": params, "opt_state": state(params)}, {})
        store.close()
        return params

    return make
