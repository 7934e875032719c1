"""Segmentation on real pixels without a download: handwritten digits on photographs.

    python -m vit_jax prepare digit_scenes/16px_single
    python -m vit_jax prepare digit_scenes/32px
    python -m vit_jax train --config=configs/scene_digits.py --workdir=runs/scene-digits
    python -m vit_jax train --config=configs/segment_scenes.py:checkpoint=runs/scene-digits \\
        --workdir=runs/scenes
    python -m vit_jax predict --workdir=runs/scenes --out=drawn.png some.png

The first run trains the backbone on single digits; the second segments scenes of 32×32 pixels with
up to four digits, 11 classes with the background. Without `checkpoint=` it starts from scratch with
the same budget. `:head=linear` and `:head=mask` use Segmenter's heads. The default head also reads
the pixels of the image, because strokes are two pixels wide.
"""

from vit_jax.config import parse_arg
from vit_jax.recipes.digit_scenes import scenes_config


def get_config(arg=None):
    arg = parse_arg(arg, checkpoint="", head="pixels", steps=3300, dir="")
    config = scenes_config(
        "image",
        "segmentation",
        name="digit_scenes/32px",
        dir=arg.dir,
        classes_of="segmentation",
    )
    # Nine tenths of the pixels are background; the Dice loss weights all classes equally.
    config.task = {"name": "segmentation", "head": arg.head, "dice": 1.0}
    if arg.head != "mask":
        config.task.subcells = 4  # Every pixel of a token's cell gets scores of its own.
    config.init.checkpoint = arg.checkpoint
    config.total = arg.steps
    return config
