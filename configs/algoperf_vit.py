"""ViT-S/16 on ImageNet-1k in the terms of AlgoPerf's `imagenet_vit` workload (Dahl et al. 2023).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/algoperf_vit.py --workdir=runs/algoperf

The target is 77.309 % on the validation images (error 0.22691), with training on all training
images. The benchmark measures the time to the target on eight V100s, with a budget of 69,768 s. The
baseline is NAdamW with the second of its five published settings. Its median over studies is
70,197 s and 153,837 steps; the best entry, Distributed Shampoo, needs 33,094 s (all from the v0.5
logs, theirs). We have not run it. On other hardware, only the number of steps is comparable. It
fits a TPU v5e-16 (8.9 of 16 GiB a chip).

Arguments: `steps=167999` (the workload's hint for the baseline), `data=ROOT`, `others=v2` for the
benchmark's test set, ImageNet-V2 (target error 0.3481), `runlocal`. Float32.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.recipes import imagenet


def get_config(arg=None):
    arg = parse_arg(arg, steps=167_999, data="", others="", runlocal=False)
    size = 32 if arg.runlocal else 224
    config = default_config()
    config.total = arg.steps
    config.batch_size = 1024

    config.model = {
        "name": "vit_s16",
        "pooling": "mean",
        "position": "sincos2d",
        "representation_size": 384,
    }
    config.task = {
        "name": "classification",
        "mixup": 0.2,
        "label_smoothing": 0.2,
        "mean": (123.675, 116.28, 103.53),
        "std": (58.395, 57.12, 57.375),
    }
    pp = imagenet.big_vision_pp(size, randaug=(2, 15))
    pp["crop"] = f"decode_jpeg_and_inception_crop({size}, 8)|flip_lr"
    imagenet.use(config, root=arg.data, others=arg.others, minival=False, **pp)
    config.eval.every = 2500

    config.optim.name = "nadamw"
    config.optim.args = {"b1": 1 - 0.11042418465, "b2": 0.9978504782314613}
    config.optim.lr = 0.0008445074561975979
    config.optim.weight_decay = 0.08135402759553023
    config.optim.decay_mask = ".*"  # The baseline decays all parameters.
    config.optim.schedule.warmup = "5 percent"

    if arg.runlocal:
        imagenet.run_locally(config, width=24, depth=2, num_heads=2, mlp_dim=48)
    return config
