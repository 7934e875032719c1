"""Eight digit scenes as a batch of the pipeline, and what a task knows of such data."""

import numpy as np
import pytest
from self_supervised_tiny import CROPS, METHODS, model_of

from vit_jax import config as config_lib
from vit_jax.data.builders import _scenes as scenes
from vit_jax.data.tokenizer import open_tokenizer
from vit_jax.types import ArraySpec, DataInfo

SIDE, MAX_OBJECTS, TEXT_LENGTH = 32, 5, 48


@pytest.fixture(scope="session")
def scene_batch():
    """`image`, `segmentation`, `boxes`, ... of eight scenes; the last image has no objects."""
    drawn = [scenes.draw_scene(5, i, split="train", side=SIDE) for i in range(8)]
    batch = {
        "image": np.stack([scene.image for scene in drawn]),
        "segmentation": np.stack([scene.segmentation for scene in drawn]),
        "boxes": np.zeros((8, MAX_OBJECTS, 4), np.float32),
        "box_label": np.full((8, MAX_OBJECTS), -1, np.int32),
        "box_crowd": np.zeros((8, MAX_OBJECTS), bool),
        "box_area": np.zeros((8, MAX_OBJECTS), np.float32),
        "image_size": np.full((8, 2), SIDE, np.int32),
        "tokens": open_tokenizer("bytes", TEXT_LENGTH).encode([one.caption for one in drawn]),
    }
    for row, scene in enumerate(drawn[:-1]):
        count = len(scene.digits)
        batch["boxes"][row, :count] = scene.boxes
        batch["box_label"][row, :count] = scene.digits
        batch["box_area"][row, :count] = scene.areas
    return batch


@pytest.fixture(scope="session")
def scene_info(scene_batch):
    """`scene_info(num_classes, *names)` → the data of a task that is given these arrays."""

    def info(num_classes, *names):
        arrays = {name: scene_batch[name] for name in names}
        spec = {name: ArraySpec(x.shape[1:], x.dtype) for name, x in arrays.items()}
        class_names = scenes.CLASS_NAMES[-num_classes:]
        return DataInfo(spec, num_classes, class_names)

    return info


@pytest.fixture
def method_config(tiny_config):
    """`method_config(name, key=value, ...)`: a run of a method on digits, uint8 of 8×8."""

    def make(method, **keys):
        config = tiny_config(total=4, ema_decay=0.0, accum_steps=1)
        config.unlock()
        config.model = model_of(method)
        config.task = {"name": method, **METHODS[method]}
        config.data.pp = CROPS if method.startswith("dino") else ""
        for key, value in keys.items():
            config_lib.set_key(config, key.replace("__", "."), value)
        return config_lib.validate(config)

    return make
