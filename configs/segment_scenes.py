"""Segmentation on real pixels without a download: handwritten digits on photographs.

    python -m vit_jax prepare digits
    python -m vit_jax prepare digit_scenes/32px
    python -m vit_jax train --config=configs/segment_scenes.py:digits --workdir=runs/digits16
    python -m vit_jax train --config=configs/segment_scenes.py:checkpoint=runs/digits16 \\
        --workdir=runs/scenes
    python -m vit_jax predict --workdir=runs/scenes --out=drawn.png some.png

The first run trains the backbone to classify single digits of 16×16 pixels; the second segments
scenes of 32×32 with up to four digits, 11 classes with the background. Without `checkpoint=` it
starts from scratch with the same budget. `:head=mask` takes Segmenter's mask transformer.
"""

from vit_jax.config import default_config, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, checkpoint="", digits=False, head="linear", epochs=12, dir="")
    config = default_config()
    config.batch_size = 64 if not arg.digits else 128
    config.total = "100 epochs" if arg.digits else f"{arg.epochs} epochs"
    config.ema_decay = 0.99
    config.model = {
        "name": "vit",
        "patch_size": 4,
        "width": 64,
        "depth": 6,
        "num_heads": 4,
        "mlp_dim": 256,
        "pooling": "mean",
        "drop_path": 0.1 if arg.digits else 0.0,
        "scan": False,
    }
    config.data.source = "tfds"
    config.data.dir = arg.dir
    config.data.split = "train"
    config.eval.sets = {"test": {"split": "test"}}
    if arg.digits:
        config.task = {"name": "classification", "mixup": 0.2, "label_smoothing": 0.1}
        config.data.name = "digits"
        distort = "random_affine(rotate=15, shift=0.1, scale=0.15, shear=10)"
        config.data.pp = f"decode(1)|resize(16)|{distort}"
        config.data.eval_pp = "decode(1)|resize(16)"
    else:
        config.task = {"name": "segmentation", "head": arg.head}
        if arg.head == "linear":
            config.task.subcells = 4  # Every pixel of a patch gets scores of its own.
        config.data.name = "digit_scenes/32px"
        config.data.args = {"classes_of": "segmentation"}
        keep = "keep('image', 'segmentation')"
        config.data.pp = f"joint_decode|joint_scale(0.8, 1.25)|joint_crop(32)|{keep}"
        config.data.eval_pp = f"joint_decode|{keep}"
        config.init.checkpoint = arg.checkpoint
    config.eval.every = "25 percent"
    config.optim.lr = 3e-3 if arg.digits else 2e-3
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = "5 percent"
    return config
