"""Digit scenes in a config: what the recipes on them share, so that one backbone serves them all.

    python -m vit_jax prepare digit_scenes/16px_single
    python -m vit_jax train --config=configs/scene_digits.py --workdir=runs/scene-digits

trains that backbone to read one digit on a piece of a photograph; `checkpoint=runs/scene-digits`
starts from it the tasks on whole scenes (`python -m vit_jax prepare digit_scenes/32px`).
"""

from ml_collections import ConfigDict

from vit_jax.config import default_config

# Tokens of 4x4 pixels behind a few convolutions: from some thousand images a plain ViT learns far
# less (docs/recipes.md). Rotary positions are relative: a digit looks the same wherever it is, and
# 16 pixels or 32 make no difference to the parameters.
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
    "unroll": 4,  # Small blocks run a quarter faster as straight code on a CPU.
}


def scenes_config(*fields: str, name: str, dir: str, classes_of: str = "label") -> ConfigDict:
    """A config of `BACKBONE` on digit scenes, whose task is still to be named.

    fields: of the records, for training and evaluation. name: of the TFDS dataset, in folder `dir`
    (empty: where TFDS keeps its datasets). classes_of: the field whose classes are the task's.
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
    # Scenes are many and each is drawn anew: scaling them would only blur their masks.
    config.data.pp = f"joint_decode|keep({', '.join(map(repr, fields))})"
    config.data.eval_pp = config.data.pp
    config.eval.sets = {"test": {"split": "test"}}
    config.eval.every = "25 percent"
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = "5 percent"
    return config
