"""The hybrid R26+ViT-S/32 on ImageNet-1k alone, by "How to train your ViT?" (Steiner et al. 2022).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/r26_s32.py --workdir=runs/r26

Arguments: `aug=medium1`, `epochs=300`, `data=ROOT`, `others=real+v2`, `runlocal`.

AugReg's release has runs of it from ImageNet-1k alone, with their scores in its index.csv, which we
could not look up; we have not run it. From ImageNet-21k the same model reaches 83.85 % at 384 px
(vision_transformer's README): `augreg.py:r26_s32,checkpoint=...`. The settings are those of
`vit_i1k.py` for S/32; the model is vision_transformer's, which has no hidden layer in the head, and
whose table of positions has a row for the class token. It fits a TPU v3-32 (10.1 of 16 GiB a core),
where it would take 4 hours at 30 % of the peak (by `plan`). Float32, first moment in bfloat16.
Mixing pairs neighbors of the whole batch instead of the part of a device; no effect is expected.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.recipes import imagenet


def get_config(arg=None):
    arg = parse_arg(arg, aug="medium1", epochs=300, data="", others="", runlocal=False)
    mixup, *randaug = imagenet.augreg(arg.aug)
    size = 32 if arg.runlocal else 224
    config = default_config()
    config.total = f"{arg.epochs} epochs"
    config.batch_size = 4096

    config.model = {"name": "r26_s32", "head_bias_init": -6.9}
    config.task = {"name": "classification", "loss": "sigmoid", "mixup": mixup}
    pp = imagenet.big_vision_pp(size, randaug)
    imagenet.use(config, root=arg.data, others=arg.others, **pp)

    imagenet.big_vision_adamw(config)

    if arg.runlocal:
        small = {"width": 24, "depth": 2, "num_heads": 2, "mlp_dim": 48}
        imagenet.run_locally(config, **small, stages=(1,), width_factor=0.5)
    return config
