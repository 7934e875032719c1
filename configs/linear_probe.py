"""A linear classifier on the frozen features of a checkpoint, trained by SGD.

    python -m vit_jax prepare cifar10
    python -m vit_jax train --workdir=runs/probe \\
        --config=configs/linear_probe.py:model=vit_b16,dataset=cifar10,checkpoint=B_16.npz

Only the head is trained (`optim.freeze`), and the optimizer keeps no state for the rest. The
arguments mean what they mean in `configs/finetune.py`; the default of `size` is 224 px, and a
checkpoint is needed. The head starts at zero, even if the checkpoint has one.
`vit_jax.inference.fewshot` fits a linear classifier in closed form, without training.

Nearly all the computation is in the forward passes: 50,000 images per epoch for CIFAR-10, with 35
GFLOPs each for ViT-B/16. This fits a TPU v5e-4 (0.9 of 16 GiB a chip) and takes a minute and a
quarter at 30 % of its peak (by `plan`). We know of no published score of this recipe, and have not
run it on released checkpoints.
"""

import os

from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError
from vit_jax.recipes.released import classifier_of


def get_config(arg=None):
    arg = parse_arg(
        arg,
        model="vit_b16",
        dataset="cifar10",
        checkpoint="",
        size=224,
        split="train",
        test="test",
        runlocal=False,
    )
    config = default_config()
    config.total = "10 epochs"
    config.batch_size = 512

    size = 32 if arg.runlocal else arg.size
    classifier_of(config, arg.model, arg.checkpoint)
    if not (config.init.checkpoint or arg.runlocal):
        raise UserError(
            "config argument checkpoint is missing: a probe measures a trained backbone; write"
            " checkpoint=FILE, or a model of the hub, such as model=facebook/dinov2-base"
        )

    config.data.source = "folder" if os.path.isdir(arg.dataset) else "tfds"
    config.data.name = arg.dataset
    config.data.split = arg.split
    config.data.pp = f"decode_jpeg_and_inception_crop({size}, 40)|flip_lr"
    config.data.eval_pp = f"decode|resize({size})"
    config.eval.sets = {"test": {"split": arg.test}}

    config.optim.name = "sgd"
    config.optim.lr = 0.1
    config.optim.freeze = ["backbone/.*"]

    if arg.runlocal:
        config.batch_size = 8
        config.total = 4
        if not config.init.checkpoint:
            config.model.update(depth=2)
    return config
