"""Detection on real pixels without a download: handwritten digits on photographs.

    python -m vit_jax prepare digits
    python -m vit_jax prepare digit_scenes/32px
    python -m vit_jax train --config=configs/segment_scenes.py:digits --workdir=runs/digits16
    python -m vit_jax train --config=configs/detect_scenes.py:checkpoint=runs/digits16 \\
        --workdir=runs/detect
    python -m vit_jax predict --workdir=runs/detect --out=drawn.png some.png

The first run trains the backbone to classify single digits of 16×16 pixels; the second finds up to
four of them in scenes of 32×32. Without `checkpoint=` it starts from scratch with the same budget.
`:head=tokens` detects with learned tokens (YOLOS) in the place of one proposal a patch.
"""

from vit_jax.config import default_config, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, checkpoint="", head="per_token", epochs=12, dir="")
    config = default_config()
    config.batch_size = 64
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
        "num_registers": 16 if arg.head == "tokens" else 0,
        "scan": False,
    }
    config.task = {"name": "detection", "head": arg.head}
    config.init.checkpoint = arg.checkpoint
    if arg.head == "tokens":
        config.init.initialise = ["backbone/registers"]
    config.data.source = "tfds"
    config.data.name = "digit_scenes/32px"
    config.data.dir = arg.dir
    config.data.args = {"classes_of": "objects", "max_objects": 4}
    config.data.split = "train"
    keep = "keep('image', 'boxes', 'box_label', 'box_crowd', 'box_area')"
    config.data.pp = f"joint_decode|joint_scale(0.8, 1.25)|joint_crop(32)|{keep}"
    config.data.eval_pp = f"joint_decode|{keep}"
    config.eval.sets = {"test": {"split": "test"}}
    config.eval.every = "25 percent"
    config.optim.lr = 2e-3
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = "5 percent"
    return config
