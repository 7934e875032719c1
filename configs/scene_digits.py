"""Pre-training for digit scenes: classification of single digits on photographs, 16×16 pixels.

    python -m vit_jax prepare digit_scenes/16px_single
    python -m vit_jax train --config=configs/scene_digits.py --workdir=runs/scene-digits

`segment_scenes.py`, `detect_scenes.py` and `contrast_scenes.py` start from it.
"""

from vit_jax.config import parse_arg
from vit_jax.recipes.digit_scenes import scenes_config


def get_config(arg=None):
    arg = parse_arg(arg, dir="", steps=16_875)
    config = scenes_config("image", "label", name="digit_scenes/16px_single", dir=arg.dir)
    config.task = {"name": "classification"}
    config.total = arg.steps
    config.batch_size = 64
    config.optim.lr = 2e-3
    return config
