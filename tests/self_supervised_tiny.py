"""Self-supervised methods on networks so small that a step takes milliseconds."""

import numpy as np

from vit_jax.types import ArraySpec, DataInfo

CROPS = "views('global', 2, 'flip_lr')|views('local', 2, 'central_crop(4)')|keep('global', 'local')"
HEAD = {"num_prototypes": 8, "head_hidden": 8, "head_bottleneck": 4}
METHODS = {
    "masked": {"decoder": {"width": 16, "depth": 1, "num_heads": 2}},
    "simmim": {"cell": 4},
    "ijepa": {"predictor_width": 16, "predictor_depth": 1, "min_keep": 0},
    "dino": HEAD,
    "dinov2": {**HEAD, "koleo_weight": 0.0},
}
MODEL = {"name": "vit", "patch_size": 2, "width": 16, "depth": 1, "num_heads": 2}
PATCHES_ALONE = {"pooling": "mean", "position": "sincos2d_mae"}


def model_of(method):
    return {**MODEL, **(PATCHES_ALONE if method == "ijepa" else {})}


def info(local=4):
    sides = {"image": (8,), "global": (2, 8), "local": (2, local)}
    return DataInfo(
        {
            name: ArraySpec((*shape, shape[-1], 3), np.dtype(np.uint8))
            for name, shape in sides.items()
        },
        0,
    )
