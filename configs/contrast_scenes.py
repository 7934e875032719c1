"""Images and captions brought together without a download: digits on photographs, in words.

    python -m vit_jax prepare digits
    python -m vit_jax prepare digit_scenes/32px
    python -m vit_jax train --config=configs/segment_scenes.py:digits --workdir=runs/digits16
    python -m vit_jax train --config=configs/contrast_scenes.py:checkpoint=runs/digits16 \\
        --workdir=runs/captions
    python -m vit_jax predict --workdir=runs/captions some.png \\
        --text="a 3 above a 7" --text="a 7 above a 3"

The first run trains the image tower to classify single digits; the second learns it and a text
tower together, on 6,000 scenes with captions such as "a 3 left of a 7". Without `checkpoint=` both
start from scratch. `:loss=sigmoid` is SigLIP's, `:lit` freezes the image tower.
"""

from vit_jax.config import default_config, parse_arg

TEXT_LENGTH = 48


def get_config(arg=None):
    arg = parse_arg(arg, checkpoint="", loss="softmax", lit=False, epochs=40, dir="")
    config = default_config()
    config.batch_size = 128
    config.total = f"{arg.epochs} epochs"
    config.ema_decay = 0.99
    config.model = {
        "name": "vit",
        "patch_size": 4,
        "width": 64,
        "depth": 6,
        "num_heads": 4,
        "mlp_dim": 256,
        "pooling": "mean",
        "scan": False,
    }
    config.task = {
        "name": "contrastive",
        "loss": arg.loss,
        "dim": 64,
        "vocab": "bytes",
        "text": {
            "name": "text",
            "width": 64,
            "depth": 2,
            "num_heads": 4,
            "mlp_dim": 256,
            "pooling": "mean",
            "scan": False,
        },
    }
    config.init.checkpoint = arg.checkpoint
    config.data.source = "tfds"
    config.data.name = "digit_scenes/32px"
    config.data.dir = arg.dir
    config.data.split = "train"
    config.data.pp = f"decode|tokenize({TEXT_LENGTH})|keep('image', 'tokens')"
    config.data.eval_pp = config.data.pp
    config.eval.sets = {"test": {"split": "test"}}
    config.eval.every = "25 percent"
    config.optim.lr = 2e-3
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = "5 percent"
    if arg.lit:
        config.optim.freeze = ["backbone/.*"]
    return config
