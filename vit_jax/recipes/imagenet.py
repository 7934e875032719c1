"""The common parts of all recipes on ImageNet.

    config = default_config()
    imagenet.use(config, root=arg.data, **imagenet.big_vision_pp(224, randaug=(2, 10)))

The data is TFDS's `imagenet2012` (`python -m vit_jax prepare imagenet2012`) or a folder of images
(`ROOT/train/n01440764/*.JPEG` and `ROOT/val/...`). Both number the 1,000 classes in the order of
the sorted synsets.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax.plugins import check_known

NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES = 1_281_167, 50_000, 1000

STATISTICS = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
"""Keys of `config.task`: ImageNet's mean and deviation as torchvision has them, for 0..255."""

MINIVAL = "train[99%:]"
"""The images that big_vision's recipes exclude from training and use to choose settings."""

# Steiner et al. 2022 (arXiv:2106.10270), section 3.3: (mixup, RandAugment layers, magnitude).
# RandAugment changes images even at magnitude 0: Invert and Equalize have no strength.
AUGREG = {
    "none": (0.0, 0, 0),
    "light1": (0.0, 2, 0),
    "light2": (0.2, 2, 10),
    "medium1": (0.2, 2, 15),
    "medium2": (0.5, 2, 15),
    "strong1": (0.5, 2, 20),
    "strong2": (0.8, 2, 20),
}

# Further test sets from TFDS, labeled with the 1,000 classes: name -> (TFDS name, split, ops after
# the preprocessing of the image). Images of ReaL (Beyer et al. 2020) have several labels, or none,
# and are then not counted. -A and -R (Hendrycks et al. 2021) have 200 of the classes, and their
# authors restrict the predictions of a model to these. TFDS has no ObjectNet.
OTHER_SETS = {
    "real": ("imagenet2012_real", "validation", '|copy("real_label","label")'),
    "v2": ("imagenet_v2/matched-frequency", "test", ""),
    "a": ("imagenet_a", "test", '|only_classes("imagenet_a")'),
    "r": ("imagenet_r", "test", '|only_classes("imagenet_r")'),
    "sketch": ("imagenet_sketch", "test", ""),
}


AS_STORED = {"exif": "ignore"}
"""`config.data.args` of folders, for published scores are those of images that are not turned."""


def use(
    config: ConfigDict,
    *,
    root: str,
    crop: str,
    augment: str = "",
    eval_pp: str,
    minival: bool = True,
    others: str = "",
) -> None:
    """Fills the sections `data` and `eval` for training on ImageNet-1k.

    root: an image folder; empty for TFDS.
    crop, augment: the ops of training, up to the first crop and after it; each op of `augment`
      begins with "|".
    minival: trains on 99 % of the training images, and also evaluates on the rest.
    others: names from `OTHER_SETS`, joined by "+", of further test sets, which must be prepared.
    """
    config.data.source = "folder" if root else "tfds"
    config.data.name = root or "imagenet2012"
    if root:
        config.data.args = dict(AS_STORED)
    config.data.split = "train[:99%]" if minival else "train"
    config.data.pp = crop + augment
    config.data.eval_pp = eval_pp
    config.data.on_bad_image = "skip" if root else "fail"
    sets = {"val": {"split": "validation"}}
    if minival:
        sets["minival"] = {"split": MINIVAL}
    config.eval.sets = {**sets, **other_sets(others, eval_pp)}


def other_sets(others: str, eval_pp: str) -> dict[str, dict[str, Any]]:
    """Returns entries of `config.eval.sets` for further test sets.

    others: names from `OTHER_SETS`, joined by "+".
    eval_pp: the preprocessing of evaluation images.

    Raises:
      UserError: there is no such test set.
    """
    sets = {}
    for name in filter(None, others.split("+")):
        check_known(name, OTHER_SETS, f"config argument others={others!r}", "list of test sets")
        dataset, split, labels = OTHER_SETS[name]
        found = {"source": "tfds", "name": dataset, "split": split, "args": {}}
        sets[name] = {**found, "pp": eval_pp + labels}
    return sets


def augreg(setting: str) -> tuple[float, int, int]:
    """Returns (mixup, RandAugment layers, magnitude) of a setting. Raises `UserError`."""
    check_known(setting, AUGREG, f"config argument aug={setting!r}")
    return AUGREG[setting]


def big_vision_pp(size: int, randaug: Sequence[int] = (0, 0)) -> dict[str, str]:
    """Returns the arguments of `use` for big_vision's ops: inception crop, flip, RandAugment."""
    layers, magnitude = randaug
    return {
        "crop": f"decode_jpeg_and_inception_crop({size})|flip_lr",
        "augment": f"|randaug({layers},{magnitude})" if layers else "",
        "eval_pp": f"decode|resize_small({round(size * 8 / 7)})|central_crop({size})",
    }


def big_vision_adamw(config: ConfigDict) -> None:
    """Sets the optimizer of big_vision's recipes, which configs/vit_s16_i1k.py explains."""
    config.optim.lr = 1e-3
    config.optim.weight_decay = 1e-4
    config.optim.decay_coupling = "schedule"
    config.optim.args = {"mu_dtype": "bfloat16"}
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = 10_000


def run_locally(config: ConfigDict, **model: int) -> None:
    """Reduces a recipe to a test of a few seconds on random images.

    model: fields that make its model small.
    """
    config.batch_size = 8
    config.accum_steps = 1
    if "mixing_groups" in config.task:
        config.task.mixing_groups = 2
    config.total = 2
    config.optim.schedule.warmup = 1
    config.optim.schedule.cooldown = 0
    config.model.update(model)
    config.init.checkpoint = ""
    config.data.source, config.data.name, config.data.split = "fake", "fake", "train"
    config.data.args = {"num_examples": 64, "num_classes": 10, "encoded": True}
    config.data.repeats = min(config.data.repeats, 2)
    config.eval.sets = {"val": {"split": "val[:16]"}}
