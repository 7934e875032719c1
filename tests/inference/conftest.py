"""Photographs, and workdirs as training leaves them, in no time."""

import pathlib
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import tasks
from vit_jax.checkpoints.store import Store
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec, DataInfo

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from photographs import write_photos

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


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of images of many sizes and formats, whose class is told by one end."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def folder_config(tiny_config, photos):
    """`folder_config(pp)`: a run on the photos, evaluated with the preprocessing `pp`."""

    def make(pp, **keys):
        return tiny_config(
            ema_decay=0.0,
            data__source="folder",
            data__name=str(photos),
            data__split="train",
            data__pp=pp,
            data__eval_pp=pp,
            eval__sets__val__split="train",
            task__mixup=0.0,
            **keys,
        )

    return make


@pytest.fixture(scope="session")
def sideways(tmp_path_factory):
    """A JPEG file whose EXIF orientation, 6, makes 40 rows of 80 pixels of 80 rows of 40."""
    path = tmp_path_factory.mktemp("sideways") / "photo.jpg"
    colors = np.random.default_rng(0).integers(0, 256, (4, 2, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colors).resize((40, 80), Image.Resampling.BILINEAR).save(path, exif=exif)
    return path
