"""The common parts of all recipes on digit scenes, which start from one pre-trained backbone.

    python -m vit_jax prepare digit_scenes/16px_single
    python -m vit_jax train --config=configs/scene_digits.py --workdir=runs/scene-digits

trains this backbone to classify one digit on a part of a photograph. With
`checkpoint=runs/scene-digits`, the tasks on whole scenes (`python -m vit_jax prepare
digit_scenes/32px`) start from it.
"""

from ml_collections import ConfigDict

from vit_jax.config import default_config

# A few convolutions give tokens of 4x4 pixels: from some thousand images, a plain ViT learns far
# less (docs/recipes.md). Rotary positions are relative, so a digit looks the same at any position,
# and the parameters are the same for images of 16 and 32 pixels.
BACKBONE = {
    "name": "r_ti16",
    "stages": (1,),
    "patch_size": 1,
    "width": 128,
    "depth": 4,
    "num_heads": 4,
    "mlp_dim": 512,
    "pooling": "mean",
    "position": "rope",
    "unroll": 4,  # On a CPU, small blocks run a quarter faster when they are unrolled.
}


def scenes_config(*fields: str, name: str, dir: str, classes_of: str = "label") -> ConfigDict:
    """Returns a config of `BACKBONE` on digit scenes, without a task.

    fields: the fields of the records, for training and evaluation.
    name: the TFDS dataset, in the folder `dir` (empty: the default folder of TFDS).
    classes_of: the field whose classes are those of the task.
    """
    config = default_config()
    config.model = dict(BACKBONE)
    config.batch_size = 32
    config.ema_decay = 0.99
    config.data.source = "tfds"
    config.data.name = name
    config.data.dir = dir
    config.data.args = {"classes_of": classes_of}
    config.data.split = "train"
    # There are many different scenes, so scaling them is not needed; it would blur their masks.
    config.data.pp = f"joint_decode|keep({', '.join(map(repr, fields))})"
    config.data.eval_pp = config.data.pp
    config.eval.sets = {"test": {"split": "test"}}
    config.eval.every = "25 percent"
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = "5 percent"
    return config
