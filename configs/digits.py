"""A small ViT on the handwritten digits that ship inside scikit-learn: 1,797 real 8×8 images.

    python -m vit_jax prepare digits
    python -m vit_jax train --config=configs/digits.py --workdir=runs/digits

It trains on the first 1,437 digits and evaluates on the last 360, in the order of their writers.
One convolution of 3×3 pixels comes before the patches, because so few images do not teach a ViT
which pixels are neighbors (Xiao et al. 2021). `configs/digits.py:plain` leaves it out: the same ViT
on the pixels themselves. `:validate` is for choosing settings without the test digits: it trains on
the first 1,150 and evaluates on the next 287. `:runlocal` is a test of a few seconds.
"""

from vit_jax.config import default_config, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, plain=False, validate=False, runlocal=False)
    config = default_config()
    config.total = "2 epochs" if arg.runlocal else "200 epochs"
    config.batch_size = 128
    config.ema_decay = 0.998

    config.model = {
        "name": "vit",
        "patch_size": 2,
        "width": 64,
        "depth": 6,
        "num_heads": 4,
        "mlp_dim": 256,
        "pooling": "mean",
        "position": "learned",
        "drop_path": 0.1,
        "unroll": 6,  # On a CPU, small blocks run a quarter faster when they are unrolled.
    }
    if not arg.plain:
        stem = {"stem_strides": (1,), "stem_kernel": 3, "stem_width": 32, "stem_norm": True}
        config.model.update({"name": "conv_stem", **stem})
    config.task = {
        "name": "classification",
        "affine": {"rotate": 15, "shift": 0.1, "scale": 0.15, "shear": 10},
        "mixup": 0.2,
        "label_smoothing": 0.1,
    }

    config.data.source = "tfds"
    config.data.name = "digits"
    config.data.split = "train[:1150]" if arg.validate else "train"
    config.eval.sets = {"test": {"split": "train[1150:]" if arg.validate else "test"}}

    config.optim.lr = 3e-3
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = "5 percent"
    return config
