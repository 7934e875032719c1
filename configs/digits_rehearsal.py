"""The recipe of `vit_s16_i1k.py` on the digits: ViT or CNN, with or without pre-training.

    python -m vit_jax prepare digits
    python -m vit_jax prepare digits_low
    python -m vit_jax prepare digits_high
    python -m vit_jax train --config=configs/digits_rehearsal.py:vit --workdir=runs/vit
    python -m vit_jax train --config=configs/digits_rehearsal.py:vit,data=low --workdir=runs/vit-low
    python -m vit_jax train --config=configs/digits_rehearsal.py:vit,data=high \\
        --workdir=runs/vit-scratch
    python -m vit_jax train --workdir=runs/vit-transfer \\
        --config=configs/digits_rehearsal.py:vit,data=high,checkpoint=runs/vit-low

The code path and the settings are those of the recipe, except for sizes and augmentation. Images
have 32 px instead of 224, the grid has 4×4 patches instead of 14×14, and batches have 32 of 1,437
images. The augmentation is weaker, because the recipe's own would destroy an 8×8 image: crops have
at least half of the image instead of a twentieth, RandAugment has magnitude 3 instead of 10, and
images are not mirrored. `bit` is a BiT-ResNet of about the same size (121,130 parameters; the ViT
has 125,290), trained with the same recipe on the same number of images. `low` are the digits 0 to
4, `high` 5 to 9. docs/recipes.md has the results and a plot.
"""

from pathlib import Path

from vit_jax.config import load, parse_arg
from vit_jax.errors import UserError, nearest

SIZE = 32
MODELS = {
    "vit": {
        "name": "vit",
        "patch_size": 8,
        "width": 48,
        "depth": 4,
        "num_heads": 3,
        "mlp_dim": 192,
        "pooling": "mean",
        "position": "sincos2d",
        "representation_size": 48,
        "scan": False,  # On a CPU, four small layers run faster without a scan.
    },
    "bit": {"name": "bit_r50x1", "stages": (1, 1), "width_factor": 0.5},
}
# data: (TFDS name, epochs)
DATA = {"digits": ("digits", 15), "low": ("digits_low", 20), "high": ("digits_high", 15)}


def get_config(arg=None):
    arg = parse_arg(arg, model="vit", data="digits", checkpoint="")
    for key, known in {"model": MODELS, "data": DATA}.items():
        value = getattr(arg, key)
        if value not in known:
            raise UserError(f"config argument {key}={value!r}; {nearest(value, known)}")
    config = load(str(Path(__file__).with_name("vit_s16_i1k.py")))
    config.unlock()
    name, epochs = DATA[arg.data]
    config.total = f"{epochs} epochs"
    config.batch_size = 32
    config.model = MODELS[arg.model]
    config.init.checkpoint = arg.checkpoint
    config.init.head = "zero"

    config.data.name = name
    config.data.split = "train"
    # A twentieth of an 8×8 image shows nothing, and a mirrored digit is not the same digit.
    config.data.pp = f"rgb|decode_jpeg_and_inception_crop({SIZE}, 50)|randaug(2, 3, corrected=True)"
    config.data.eval_pp = f"rgb|resize({SIZE})"
    config.eval.sets = {"test": {"split": "test"}}
    config.eval.every = "100 percent"
    config.checkpoint.every = "100 percent"

    config.optim.schedule.warmup = "9 percent"  # 10,000 of 111,475 steps.
    return config
