"""A small ViT on Fashion-MNIST: 60,000 and 10,000 gray images of clothes, 28×28 (Xiao et al. 2017).

    python -m vit_jax prepare fashion_mnist
    python -m vit_jax train --config=configs/fashion_mnist.py --workdir=runs/fashion

`data=DIR` reads the four files of the dataset (`train-images-idx3-ubyte.gz`, ...) in place of
TensorFlow Datasets, such as those of Debian's package dataset-fashion-mnist:

    python -m vit_jax train --workdir=runs/fashion \\
        --config=configs/fashion_mnist.py:data=/usr/share/datasets/fashion-mnist

Three convolutions of 3×3 pixels come before the blocks, because a small ViT takes long to learn
from 60,000 images which pixels are neighbors (Xiao et al. 2021), and Muon trains the kernels of the
blocks (Jordan et al. 2024). `plain` is a ViT of six blocks in place of three, on patches of 4×4
pixels, trained by AdamW.

`validate` is for choosing settings without the test images: it trains on the first 50,000 training
images and evaluates on the last 10,000. `epochs=18` sets the length; `runlocal` is a test of a few
seconds. docs/recipes.md has the results.
"""

from vit_jax.config import default_config, parse_arg

CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
]  # fmt: skip


def get_config(arg=None):
    arg = parse_arg(arg, data="", epochs=18, plain=False, validate=False, runlocal=False)
    config = default_config()
    config.total = 2 if arg.runlocal else f"{arg.epochs} epochs"
    config.batch_size = 8 if arg.runlocal else 128
    config.ema_decay = 0.998

    if arg.plain:
        model = {"name": "vit", "patch_size": 4, "depth": 6}
    else:
        # Strides of 2, 1 and 2 make 7×7 patches of an image of 28×28 pixels.
        stem = {"stem_strides": (2, 1, 2), "stem_kernel": 3, "stem_width": 64, "stem_norm": True}
        model = {"name": "conv_stem", **stem, "patch_size": 1, "depth": 3}
    config.model = {
        **model,
        "width": 96,
        "num_heads": 3,
        "mlp_dim": 384,
        "pooling": "mean",
        "position": "learned",
        "unroll": model["depth"],  # On a CPU, small blocks run faster when they are unrolled.
    }
    # Clothes have no side: shirts are mirrored, and all are moved by up to two pixels.
    config.task = {
        "name": "classification",
        "affine": {"shift": 0.07, "scale": 0.1},
        "label_smoothing": 0.1,
    }

    config.data.source = "idx" if arg.data else "tfds"
    config.data.name = arg.data or "fashion_mnist"
    if arg.data:
        config.data.args = {"class_names": CLASSES}
    config.data.split = "train[:50000]" if arg.validate else "train"
    config.data.pp = "decode(1)|flip_lr"
    config.data.eval_pp = "decode(1)"
    held_out = "train[50000:]" if arg.validate else "test"
    config.eval.sets = {"val" if arg.validate else "test": {"split": held_out}}

    config.eval.every = "20 percent"

    config.optim.name = "adamw" if arg.plain else "muon"
    config.optim.lr = 2e-3 if arg.plain else 5e-3
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = "5 percent"
    return config
