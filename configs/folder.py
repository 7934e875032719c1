"""A ViT on your own images: a folder ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, or a table.

    python -m vit_jax train --config=configs/folder.py:ROOT --workdir=runs/mine
    python -m vit_jax train --config=configs/folder.py:ROOT,checkpoint=vit_s16 --workdir=runs/mine

`checkpoint` fine-tunes a released model in place of training from scratch. It is the name of a
model that `python -m vit_jax models --released` lists; the folder of a model of timm, transformers
or open_clip, its name (facebook/dinov2-base) or address (hf://USER/REPO) on the hub; a workdir; or
a file that does not tell its model, together with `model=NAME`. What the files beside a checkpoint
tell of its images (size, mean, std) is obeyed. Without it a small model is trained from scratch.

ROOT may also be a table (`photos.csv`, `photos/{split}.csv`, `shards/*.parquet`), tar files of
WebDataset (`shards/{000..015}.tar`), or a Hugging Face dataset in Parquet; see
vit_jax/data/sources/table.py and webdataset.py. If there is no split for validation, `test`
takes its place, or else a fixed tenth of the images is held out, or the share `val=0.2`. If a
name has commas, put it into double quotes, and the whole value into single quotes, which the shell
removes: `--config='configs/folder.py:"my, photos"'`.

The columns of a table are told by `image=photo,label=species`, and by `separator`, `split_column`
and `group`; for a folder, `group` is a pattern of file names. They become `config.data.args`, which
the sources `table` and `folder` describe. The flag `--config.data.args` is read too late for the
choices below, which need the number of images.

Further arguments: `size=96,epochs=50,batch=64`. What is not given is chosen by the number of
training images, and printed with the reason. The choices follow the fine-tuning settings of
Dosovitskiy et al. 2021 (SGD, no weight decay, a new head), shortened for few images; we have not
compared them with others.
"""

import sys
from typing import Any

from vit_jax.config import default_config, parse_arg
from vit_jax.recipes.own_images import batch_size, count_images, data_of, model_of
from vit_jax.recipes.released import normalize_as_told

SOURCE_ARGS = ("image", "label", "separator", "split_column", "group")


def get_config(arg=None):
    arg = parse_arg(
        arg, root="", checkpoint="", model="", size=0, epochs=0, batch=0,
        image="", label="", separator="", split_column="", group="", val=0.0,
    )  # fmt: skip
    config = default_config()
    source, split, held_out = data_of(arg.root, arg.split_column, arg.group, arg.val)
    config.data.source = source
    config.data.name = arg.root
    config.data.split = split
    config.data.args = {name: getattr(arg, name) for name in SOURCE_ARGS if getattr(arg, name)}
    config.eval.sets = {"val": {"split": held_out}}
    advice = "; as an argument of this config it is written image=COLUMN,label=COLUMN"
    count = count_images(config.data, advice if source == "table" else "")
    is_new = not arg.checkpoint
    config.batch_size = arg.batch or batch_size(count)
    config.total = f"{arg.epochs or epochs(count, is_new)} epochs"
    if is_new:
        size = arg.size or 96
        from_scratch(config, arg.model or "vit_ti16", size, count)
    else:
        size = fine_tuned(config, arg.checkpoint, arg.model, arg.size)
    config.data.eval_pp = f"decode|resize_small({round(size * 8 / 7)})|central_crop({size})"
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = "5 percent"
    if count:
        start = "from random parameters" if is_new else f"from {config.init.checkpoint}"
        print(
            f"{count:,} training images ({split}, evaluated on {held_out}): {config.model.name}"
            f" {start}, {size} px, batches of {config.batch_size}, {config.total}, learning rate"
            f" {config.optim.lr:.3g}, augmentation {augmentation(config)}; fewer images are seen"
            f" more often, in smaller batches; {AUGMENTED_BECAUSE[is_new]}",
            file=sys.stderr,
        )
    return config


AUGMENTED_BECAUSE = {
    True: "without a checkpoint the augmentation is strong, but weaker below 2,000 images",
    False: "a checkpoint is fine-tuned with crops and flips alone, as in the paper",
}


def augmentation(config: Any) -> str:
    """Returns the augmentation of the training images in words."""
    mixup = config.task.get("mixup", 0)
    return config.data.pp + (f" and mixup {mixup:g}" if mixup else "")


def epochs(count: int, is_new: bool) -> int:
    """Returns the length of training; a model that was trained before needs less."""
    for limit, from_random, fine_tuning in ((2_000, 100, 30), (20_000, 50, 15)):
        if count < limit:
            return from_random if is_new else fine_tuning
    return 30 if is_new else 8


def from_scratch(config: Any, model: str, size: int, count: int) -> None:
    """Sets a small model with strong augmentation, weaker where there are few images."""
    config.model = {"name": model, "drop_path": 0.1}
    config.task = {"name": "classification", "mixup": 0.2, "label_smoothing": 0.1}
    # At a magnitude of 10, many of a few hundred photographs cannot be recognized.
    magnitude = 10 if count >= 2_000 else 5
    config.data.pp = (
        f"decode_jpeg_and_inception_crop({size})|flip_lr|randaug(2,{magnitude},corrected=True)"
    )
    config.ema_decay = 0.999 if count >= 2_000 else 0.99
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.05


def fine_tuned(config: Any, checkpoint: str, model: str, size: int) -> int:
    """Sets the fine-tuning of a checkpoint. Returns the side of the images, `size` if not 0."""
    config.model, checkpoint = model_of(checkpoint, model)
    config.task = {"name": "classification"}
    told = normalize_as_told(config, checkpoint)
    size = size or (told and told.size and told.size[0]) or 224
    config.init.checkpoint = checkpoint
    config.init.head = "zero"
    config.data.pp = f"decode_jpeg_and_inception_crop({size})|flip_lr"
    config.optim.name = "sgd"
    config.optim.args = {"momentum": 0.9}
    # The paper has rates of 0.003 to 0.03 for batches of 512 images.
    config.optim.lr = 0.03 * config.batch_size / 512
    return size
