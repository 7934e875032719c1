"""Fine-tunes AugReg's models from ImageNet-21k to ImageNet-1k (Steiner et al. 2022).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --workdir=runs/augreg-b16 \\
        --config=configs/augreg.py:vit_b16,checkpoint=B_16-i21k-....npz

`python -m vit_jax models` names the models. Arguments: `size=384` or 224, `data=ROOT`,
`others=real+v2`, `runlocal`.

Expected top-1 on the validation images, % (theirs; we have not run it; 384 px: vision_transformer's
README, 224 px: the released files as timm measured them):

    model        224     384
    vit_ti16     75.45   78.22
    vit_s32              79.58
    vit_s16      81.40   83.73
    r26_s32              83.85
    vit_b32      80.73   83.59
    vit_b16      84.53   85.49
    vit_l16      85.86   85.59

20,000 steps of momentum SGD in batches of 512 with the cosine schedule; appendix B of the paper
sweeps the learning rate over 0.001, 0.003, 0.01 and 0.03 for each: --config.optim.lr=0.03 for the
small models. Hours: `finetune.py` gives those of B/32 to L/16 on A100s. At 384 px B/16 fits a TPU
v5e-64 (9.1 of 16 GiB a chip), L/16 a v5e-128 (14.5): a quarter and half an hour at 30 % of the
chips' peak (by `plan`). Float32.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.recipes import imagenet


def get_config(arg=None):
    arg = parse_arg(
        arg, model="vit_b16", checkpoint="", size=384, data="", others="", runlocal=False
    )
    size = 32 if arg.runlocal else arg.size
    config = default_config()
    config.total = 20_000
    config.batch_size = 512

    config.model = {"name": arg.model}
    config.task = {"name": "classification"}
    config.init.checkpoint = arg.checkpoint
    config.init.head = "zero"
    # As in vision_transformer: only crops and flips, and evaluation changes the aspect ratio.
    imagenet.use(
        config,
        root=arg.data,
        others=arg.others,
        crop=f"decode_jpeg_and_inception_crop({size})|flip_lr",
        augment="",
        eval_pp=f"decode|resize({size})",
    )

    config.optim.name = "sgd"
    config.optim.args = {"momentum": 0.9, "momentum_dtype": "bfloat16"}
    config.optim.lr = 0.01
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = 500

    if arg.runlocal:
        small = {"width": 24, "depth": 2, "num_heads": 2, "mlp_dim": 48}
        stages = {"stages": (1,), "width_factor": 0.5} if arg.model.startswith("r") else {}
        imagenet.run_locally(config, **small, **stages)
    return config
