"""SimMIM: pixels of masked squares, from one linear layer; on ImageNet-1k (Xie et al. 2022).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/simmim_b16_i1k.py --workdir=runs/simmim

Arguments: `epochs`, 800 (the learning rate falls to a tenth at 7/8 of them); `data=ROOT`, an image
folder in place of TFDS; `runlocal` tries it in seconds.

Expected top-1 on ImageNet after fine-tuning for 100 epochs: 83.8 % (microsoft/SimMIM, README.md).
They do not tell the hardware of ViT-B; their example for Swin has 16 GPUs with 128 images each, the
batch of the paper. We have not run it. Their fine-tuning gives each block the table of relative
positions that all blocks shared; there is no recipe for that here.

`configs/simmim_b16_i1k.csv` holds every setting against theirs. What differs, with the effect we
expect:

* Products are in bfloat16; theirs are in float16 by automatic mixed precision. None.
* Kernels of the blocks and the mask token start at a deviation of 0.02, theirs are cut off at that
  deviation; theirs also divides those of the last layer of a branch by the root of twice the
  block's number, as BEiT does. The patch embedding starts as PyTorch's convolutions do, theirs as
  the kernels; the last layer the other way around. Small.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.recipes import crops, imagenet


def get_config(arg=None):
    arg = parse_arg(arg, epochs=800, data="", runlocal=False)
    pixels = 32 if arg.runlocal else 224
    config = default_config()
    config.total = f"{arg.epochs} epochs"
    config.batch_size = 2048
    imagenet.use(
        config,
        root=arg.data,
        minival=False,
        crop=f"decode|{crops.random_crop(pixels, 67, 100, 'bilinear')}|flip_lr",
        eval_pp=crops.evaluation(pixels),
    )
    config.model = {
        "name": "vit_b16",
        "activation": "gelu",
        "initialization": "deit",
        "drop_path": 0.1,
        "layer_scale": 0.1,
        "key_bias": False,
        # One table of relative positions for all blocks, and no other positions.
        "position": "none",
        "position_bias": "shared_table",
        "dtype": "bfloat16",
        "residual_dtype": "float32",
    }
    config.task = {
        "name": "simmim",
        "cell": 32,
        "ratio": 0.6,
        **imagenet.STATISTICS,
    }
    config.optim.lr = 1e-4 * config.batch_size / 512
    config.optim.schedule.update(
        name="simmim_stair",
        warmup="10 epochs",
        first=5e-7 / 1e-4,
        boundaries=[f"{arg.epochs * 7 // 8} epochs"],
        factors=[0.1],
    )
    config.optim.weight_decay = 0.05
    config.optim.decay_mask = r".*/kernel|mask_token|.*/table"
    config.optim.clip_norm = 5.0
    if arg.runlocal:
        imagenet.run_locally(config, width=24, depth=2, num_heads=2, mlp_dim=48, patch_size=4)
        config.task.cell = 8
        config.optim.schedule.boundaries = [2]
    return config
