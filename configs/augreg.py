"""Fine-tunes AugReg's models from ImageNet-21k to ImageNet-1k (Steiner et al. 2022).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --workdir=runs/augreg-b16 \\
        --config=configs/augreg.py:vit_b16,checkpoint=B_16-i21k-....npz

`python -m vit_jax models` names the models. Arguments: `size=384` or 224, `data=ROOT`,
`others=real+v2`, `runlocal`. `checkpoint` may be a run of `vit_i21k.py`, whose pooling is kept.

Expected top-1 on the validation images, % (theirs; we have not run it). The rate is that of the
fine-tuned file and this config's default. At 384 px, from vision_transformer's README, which names
the files, and the paper's table 3, which has the same numbers:

    model       file pre-trained on ImageNet-21k   lr     384 px
    vit_ti16    aug_none, wd_0.03                  0.03   78.22
    vit_s32     aug_none, wd_0.1                   0.01   79.58
    vit_s16     aug_light1, wd_0.03                0.03   83.73
    r26_s32     aug_light1, wd_0.1                 0.01   83.85
    vit_b32     aug_light1, wd_0.1                 0.01   83.59
    vit_b16     aug_medium1, wd_0.1                0.03   85.49
    vit_l16     aug_strong1, wd_0.1                0.01   85.59

At 224 px the paper has the first column below (table 3, i21k_300). The second is of the released
files that timm names (in vision_transformer.py and vision_transformer_hybrid.py), as timm measured
them, with a central crop of 90 %, bicubic (results-imagenet.csv @0173a13). This config evaluates
whole images, resized, as vision_transformer does; so `val` should be compared with the first
column, although its table does not state the crop. Four of the files that timm names were
pre-trained otherwise than those above; its L/16 has 87.08 at 384 px, in the table as i21k_v2:

    model       paper   timm    timm's file, on ImageNet-21k   lr
    vit_ti16    73.75   75.45   aug_none, wd_0.03              0.03
    vit_s32     73.47   75.99   aug_light1, wd_0.03            0.03
    vit_s16     80.46   81.38   aug_light1, wd_0.03            0.03
    r26_s32     80.81   81.86   aug_light0, wd_0.03, do_0.1    0.03
    vit_b32     79.13   80.72   aug_medium1, wd_0.03           0.03
    vit_b16     83.96   84.53   aug_medium1, wd_0.1            0.01
    vit_l16     83.98   85.83   aug_medium1, wd_0.1, do_0.1    0.01

(do_0.1: dropout and stochastic depth of 0.1.)

20,000 steps of momentum SGD in batches of 512 with the cosine schedule. Hours: `finetune.py` gives
those of B/32 to L/16 on A100s. At 384 px B/16 fits a TPU v5e-64 (9.1 of 16 GiB a chip), L/16 a
v5e-128 (14.5): a quarter and half an hour at 30 % of the chips' peak (by `plan`). Float32; as
everywhere here, resized pixels are truncated to whole levels, which theirs are not.
"""

from vit_jax import checkpoints
from vit_jax.config import default_config, parse_arg
from vit_jax.recipes import imagenet

# The models whose fine-tuned files have a rate of 0.03, by the pixels; the others have 0.01. Sizes
# between take the rates of 384 px.
HIGHER_RATE = {
    384: ("vit_ti16", "vit_s16", "vit_b16"),
    224: ("vit_ti16", "vit_s16", "vit_s32", "vit_b32", "r26_s32"),
}


def get_config(arg=None):
    arg = parse_arg(
        arg, model="vit_b16", checkpoint="", size=384, data="", others="", runlocal=False
    )
    size = 32 if arg.runlocal else arg.size
    config = default_config()
    config.total = 20_000
    config.batch_size = 512

    config.model = {"name": arg.model} | checkpoints.pooling_of(arg.checkpoint)
    config.task = {"name": "classification"}
    config.init.checkpoint = arg.checkpoint
    config.init.head = "zero"
    # As in vision_transformer: only crops and flips, and evaluation changes the aspect ratio.
    imagenet.use(
        config,
        root=arg.data,
        others=arg.others,
        crop=f"decode_jpeg_and_inception_crop({size})|flip_lr",
        eval_pp=f"decode|resize({size})",
    )

    config.optim.name = "sgd"
    config.optim.args = {"momentum": 0.9, "momentum_dtype": "bfloat16"}
    higher = HIGHER_RATE[224 if arg.size <= 224 else 384]
    config.optim.lr = 0.03 if arg.model in higher else 0.01
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = 500

    if arg.runlocal:
        small = {"width": 24, "depth": 2, "num_heads": 2, "mlp_dim": 48}
        stages = {"stages": (1,), "width_factor": 0.5} if arg.model.startswith("r") else {}
        imagenet.run_locally(config, **small, **stages)
    return config
