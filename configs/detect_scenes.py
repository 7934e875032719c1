"""Detection on real pixels without a download: handwritten digits on photographs.

    python -m vit_jax prepare digit_scenes/16px_single
    python -m vit_jax prepare digit_scenes/32px
    python -m vit_jax train --config=configs/scene_digits.py --workdir=runs/scene-digits
    python -m vit_jax train --config=configs/detect_scenes.py:checkpoint=runs/scene-digits \\
        --workdir=runs/detect
    python -m vit_jax predict --workdir=runs/detect --out=drawn.png some.png

The first run trains the backbone on single digits; the second finds up to four of them in scenes of
32×32 pixels. Without `checkpoint=` it starts from scratch with the same budget. `:head=tokens`
detects with learned tokens (YOLOS) in the place of one proposal a token.
"""

from vit_jax.config import parse_arg
from vit_jax.data.builders._scenes import MAX_DIGITS
from vit_jax.recipes.digit_scenes import scenes_config


def get_config(arg=None):
    arg = parse_arg(arg, checkpoint="", head="per_token", steps=2500, dir="")
    config = scenes_config(
        "image",
        "boxes",
        "box_label",
        "box_crowd",
        "box_area",
        name="digit_scenes/32px",
        dir=arg.dir,
        classes_of="objects",
    )
    config.data.args.max_objects = MAX_DIGITS
    config.task = {"name": "detection", "head": arg.head}
    if arg.head == "tokens":
        config.model.num_registers = 16
        config.init.initialize = ["backbone/registers"]
    config.optim.lr = 2e-3
    config.init.checkpoint = arg.checkpoint
    config.total = arg.steps
    return config
