"""The hybrid R26+ViT-S/32 on ImageNet-1k alone, by "How to train your ViT?" (Steiner et al. 2022).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/r26_s32.py --workdir=runs/r26

Arguments: `aug=medium2`, `epochs=300`, `data=ROOT`, `others=real+v2`, `runlocal`.

The paper has 79.61 % at 224 px (theirs, table 3; we have not run it), which is its best of two
weight decays, with and without regularization. By its figure 4, on images that training leaves out,
`medium2` is best without regularization, at 80 (`medium1` has 79); with dropout and stochastic
depth of 0.1, `medium1` and `medium2` have 82. This recipe has neither, as big_vision's have not;
`--config.model.dropout=0.1 --config.model.drop_path=0.1` adds them. From ImageNet-21k the same
model reaches 83.85 % at 384 px (vision_transformer's README): `augreg.py:r26_s32,checkpoint=...`.

Other settings are those of `vit_i1k.py`; the model is vision_transformer's, which has no hidden
layer in the head, and whose table of positions has a row for the class token. It fits a TPU v3-32
(10.1 of 16 GiB a core), where it would take 4 hours at 30 % of the peak (by `plan`). Float32, first
moment in bfloat16. Mixing pairs neighbors of the whole batch instead of the part of a device; no
effect is expected.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.recipes import imagenet


def get_config(arg=None):
    arg = parse_arg(arg, aug="medium2", epochs=300, data="", others="", runlocal=False)
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
