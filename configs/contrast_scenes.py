"""Contrastive training without a download: digits on photographs, and captions.

    for name in digit_scenes/16px_single digit_scenes/32px; do
      python -m vit_jax prepare $name; done
    python -m vit_jax train --config=configs/scene_digits.py --workdir=runs/scene-digits
    python -m vit_jax train --workdir=runs/captions \\
        --config=configs/contrast_scenes.py:checkpoint=runs/scene-digits
    python -m vit_jax predict --workdir=runs/captions some.png \\
        --text="a 3 above a 7" --text="a 7 above a 3"

The first run trains the image tower to read single digits; the second learns it and a text tower
together, from scenes with captions such as "a 3 left of a 7". Without `checkpoint=` both start
from scratch. `:loss=sigmoid` is SigLIP's loss; `:lit` freezes the image tower, as LiT does.
"""

from pathlib import Path

from vit_jax.config import parse_arg
from vit_jax.recipes.digit_scenes import scenes_config

VOCAB = Path(__file__).with_name("scene_words.txt")
TEXT_LENGTH = 16  # Of the longest captions, of four digits.


def get_config(arg=None):
    arg = parse_arg(arg, checkpoint="", loss="softmax", lit=False, steps=1600, dir="")
    config = scenes_config(
        "image", "caption", name="digit_scenes/32px", dir=arg.dir, classes_of="objects"
    )
    config.total = arg.steps
    config.batch_size = 64
    config.task = {
        "name": "contrastive",
        "loss": arg.loss,
        "dim": 128,
        "text": {
            "name": "text",
            "width": 128,
            "depth": 2,
            "num_heads": 4,
            "mlp_dim": 512,
            "pooling": "mean",
            "unroll": 2,
        },
    }
    config.init.checkpoint = arg.checkpoint
    config.data.pp = f"decode|tokenize({TEXT_LENGTH}, {str(VOCAB)!r})|keep('image', 'tokens')"
    config.data.eval_pp = config.data.pp
    if arg.lit:
        config.optim.freeze = ["backbone/.*"]
    else:
        # Captions describe digits and their positions, which attention pooling learns better than
        # mean pooling.
        config.model.pooling = "map"
        config.init.initialize = ["backbone/map_head/.*"]
    return config
