"""A small ViT, and images for it."""

import jax
import numpy as np
from golden_trees import random_params

from vit_jax import models

TINY = {"patch_size": 4, "width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48}
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 16, 3)).astype(np.float32)


def tiny(num_classes=3, **fields):
    return models.build("vit", num_classes=num_classes, **{**TINY, **fields})


def init(model, images=IMAGES):
    return random_params(model, images)


def apply(model, params, images=IMAGES, **kwargs):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, **kwargs))(params, images)
