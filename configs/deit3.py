"""ViT-S, -B and -L on ImageNet-1k alone by "DeiT III" (Touvron et al. 2022, arXiv:2204.07118).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/deit3.py:s16 --workdir=runs/deit3-s16
    python -m vit_jax train --config=configs/deit3.py:b16 --workdir=runs/deit3-b16
    python -m vit_jax train --config=configs/deit3.py:b16,checkpoint=runs/deit3-b16 \\
        --workdir=runs/deit3-b16-224

800 epochs (S at 224 px, B and L at 192) and, with `checkpoint`, the 20 of fine-tuning at
`size`: 224 for B and L, 384 for all. Arguments besides: `epochs`, `data=ROOT`, `others=real+v2`,
`runlocal`.

Expected top-1 on the validation images, % (theirs, README_revenge.md; we have not run it): at 224
S 81.4, B 83.8, L 84.9; at 384 S 83.4, B 85.0, L 85.8. A run can be held to their logs in that file
(@b001f95):

    epoch of the first stage   S (224)   B (192)   L (192)
    50                         53.6      56.6      55.8
    100                        63.1      67.2      68.1
    200                        67.9      73.0      73.9
    400                        74.4      78.0      79.6
    600                        79.6      81.8      83.3
    800                        81.38     82.82     84.02
    after 20 more at 224                 83.80     84.86
    after 20 more at 384       83.42     85.08     85.81

They used 8 GPUs; 32 for the first stage and for 384 px of L, and 16 for 384 px of B. The 800 epochs
fit a TPU v5e-16 (S; 13.5 of 16 GiB a chip), v5e-32 (B; 12.1) or v5e-128 (L; 12.7), where they would
take 8, 12 and 10 hours at 30 % of the chips' peak (by `plan`).

`configs/deit3.csv` holds every setting against theirs. What differs, with the effect we expect:

* Products are in bfloat16 instead of float16. None.
* JPEG files are decoded by TensorFlow and resized pixels are truncated; theirs are decoded by
  Pillow and rounded, half a level of 255 higher on average. None.
* LAMB rescales the kernels of queries, keys and values one by one; theirs are one tensor with one
  ratio. The three start with the same deviation, so the ratios are about equal at first; later the
  values' kernel may move a little more or less than theirs. Small, of unknown sign.
* Their three copies of an image meet different images in mixing; here copies are neighbors of
  copies of one other image. Small; their own samples of a batch are correlated, too.
* The learning rate follows the step instead of the epoch, and starts from 0. Theirs is that of one
  epoch before, and its cosine runs through the warm-up, too: after the warm-up ours is up to 3.5
  epochs behind, at the end 1.5 ahead. None expected in 800 epochs.
* An epoch of three copies an image takes a third of the images. Theirs are the first of a new
  permutation in every epoch, these the next of a permutation that lasts three. None expected.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError, nearest
from vit_jax.recipes import deit3, imagenet

# size: (pixels and learning rate of the first stage; GPUs that mix on their own and drop path, both
# of the first stage, of fine-tuning up to 224 px, and above it).
SIZES = {
    "s16": (224, 4e-3, (8, 8, 8), (0.05, 0.0, 0.0)),
    "b16": (192, 3e-3, (8, 8, 16), (0.2, 0.2, 0.15)),
    "l16": (192, 3e-3, (32, 8, 32), (0.45, 0.45, 0.4)),
}


def get_config(arg=None):
    arg = parse_arg(
        arg, variant="s16", epochs=0, checkpoint="", size=0, data="", others="", runlocal=False
    )
    if arg.variant not in SIZES:
        raise UserError(f"config argument variant={arg.variant!r}; {nearest(arg.variant, SIZES)}")
    first_size, lr, all_gpus, drop_path = SIZES[arg.variant]
    pixels = arg.size or (224 if arg.checkpoint else first_size)
    stage = bool(arg.checkpoint) * (2 if pixels > 224 else 1)
    gpus = all_gpus[stage]
    config = default_config()
    config.model = {
        "name": f"vit_{arg.variant}",
        "class_token_position": False,
        # LAMB moves a kernel by a share of its norm, so the initial norms matter, and a head of
        # zeros would hardly grow.
        "initialization": "deit",
        "head_zero_init": False,
        "layer_scale": 1e-4,
        "activation": "gelu",
        "drop_path": drop_path[stage],
        "constant_drop_path": True,
        "dtype": "bfloat16",
        "residual_dtype": "float32",
    }
    config.task = {"name": "classification"}
    fine_tune = bool(arg.checkpoint)
    size = 32 if arg.runlocal else pixels
    deit3.use_images(config, size=size, root=arg.data, others=arg.others, fine_tune=fine_tune)
    if fine_tune:
        deit3.fine_tune(config, epochs=arg.epochs or 20, checkpoint=arg.checkpoint, gpus=gpus)
    else:
        deit3.train(config, epochs=arg.epochs or 800, lr=lr, gpus=gpus)

    if arg.runlocal:
        imagenet.run_locally(config, width=24, depth=2, num_heads=2, mlp_dim=48)
    return config
