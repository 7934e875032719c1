"""Continues the pre-training of a released ViT on your own images, of which none needs a label.

    python -m vit_jax train --config=configs/adapt.py:PHOTOS,checkpoint=vit_s16 --workdir=runs/mine
    python -m vit_jax train --workdir=runs/mine \\
        --config=configs/adapt.py:PHOTOS,checkpoint=facebook/dinov2-small,lora=8

PHOTOS is a folder of images at any depth. Where it has a folder for each class, as in
configs/folder.py, every evaluation also tells how well frozen features tell the classes apart:
`knn_20`, the nearest neighbors of DINO, and `linear`, least squares. The classes are read for that
alone. `checkpoint` is what it is in configs/folder.py: the name of a released model; the folder,
the name or the address (hf://USER/REPO) of a model on the hub; a workdir; or a file with
`model=NAME`.

`method=dino` (Caron et al. 2021) compares crops of an image, `method=mae` (He et al. 2022) rebuilds
removed patches. `lora=8` trains adapters of that rank in place of the backbone's own parameters (Hu
et al. 2021). Further arguments: `size=224,epochs=50,batch=64`. Afterwards the run is a checkpoint
like any other: `configs/folder.py:PHOTOS,checkpoint=runs/mine`, `features runs/mine ...`.

The learning rates are a tenth of those of the papers, and the lengths are by the number of images.
These are our choices; we have not compared them with others.
"""

import sys

from vit_jax import models
from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError, nearest
from vit_jax.recipes import crops
from vit_jax.recipes.own_images import batch_size, count_images, labeled_splits, model_of
from vit_jax.recipes.released import normalize_as_told

METHODS = ("dino", "mae")


def get_config(arg=None):
    arg = parse_arg(
        arg, root="", checkpoint="", method="dino", model="", size=0, epochs=0, batch=0, lora=0
    )
    if arg.method not in METHODS:
        raise UserError(f"config argument method={arg.method!r}; {nearest(arg.method, METHODS)}")
    if not arg.checkpoint:
        raise UserError("config argument checkpoint is missing; write which model to start from")
    config = default_config()
    config.data.source, config.data.name = "image_files", arg.root
    config.data.split = "train[:95%]"
    config.eval.sets = {"val": {"split": "train[95%:]"}}
    splits = labeled_splits(arg.root)
    if splits:
        known, held_out, count = splits
        config.data.source, config.data.split = "folder", known
        config.eval.sets = {"val": {"split": held_out}}
        config.eval.probes = {"split": known}
    else:
        count = count_images(config.data)
    config.data.on_bad_image = "skip"
    config.batch_size = arg.batch or batch_size(count)
    config.total = f"{arg.epochs or epochs(count)} epochs"

    config.model, config.init.checkpoint = model_of(arg.checkpoint, arg.model)
    size = arg.size or 224
    (_dino if arg.method == "dino" else _mae)(config, size)
    normalize_as_told(config, config.init.checkpoint)
    if arg.lora:
        config.task.lora = {"rank": arg.lora}
    config.data.eval_pp = crops.evaluation(size)
    if count:
        print(
            f"{count:,} images: {config.model.name} from {config.init.checkpoint} by {arg.method},"
            f" {size} px, batches of {config.batch_size}, {config.total}, learning rate"
            f" {config.optim.lr:.3g}",
            file=sys.stderr,
        )
    return config


def epochs(count: int) -> int:
    """Returns the length of training: more passes over fewer images."""
    return 100 if count < 2_000 else 50 if count < 20_000 else 10


def _dino(config, size: int) -> None:
    stride = models.token_stride(models.build(**config.model))
    if stride is None:
        raise UserError(
            f"{config.model.name} has no patches, which DINO's crops are made of; write another"
            " checkpoint"
        )
    # A local crop has 6/14 of the side, in whole patches.
    small = max(1, round(size * 96 / 224 / stride[0])) * stride[0]
    config.data.pp = crops.multi_crop(area=40, sides=(size, small))
    config.model.update(pooling="token", drop_path=0.1)
    # Few prototypes suffice for few images; the temperature stays at its first value.
    config.task = {"name": "dino", "num_prototypes": 4096}
    config.optim.lr = 5e-5 * config.batch_size / 256
    config.optim.schedule.update(name="dino", warmup="10 percent", end=0.01)
    config.optim.weight_decay = 0.04
    config.optim.decay_mask = r".*/kernel"
    config.optim.clip_norm, config.optim.clip_scope = 3.0, "parameter"
    config.optim.freeze_until = [["dino_head/prototypes/.*", "5 percent"]]


def _mae(config, size: int) -> None:
    config.data.pp = f"decode|{crops.random_crop(size, 20, 100)}|flip_lr"
    config.task = {"name": "masked"}
    config.optim.lr = 1.5e-5 * config.batch_size / 256
    config.optim.args = {"b2": 0.95}
    config.optim.schedule.warmup = "10 percent"
    config.optim.weight_decay = 0.05
