"""I-JEPA: tokens of a teacher predicted from a part of the image (Assran et al. 2023).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/ijepa_h14_i1k.py --workdir=runs/ijepa

Arguments: `epochs`, 300; `data=ROOT`, an image folder in place of TFDS; `runlocal` tries it in
seconds. The published backbone is the teacher's.

Expected top-1 on ImageNet of a linear classifier on frozen features: 79.3 %; their time: 16 A100 of
80 GB (facebookresearch/ijepa, README.md), under 72 hours (abstract and table 1 of the paper). We
have not run it.

`configs/ijepa_h14_i1k.csv` holds every setting against theirs
(configs/in1k_vith14_ep300.yaml). What differs, with the effect we expect:

* Contexts are in buffers of 128 of 256 patches, so that their shape does not change from step to
  step; longer ones are cut. As theirs, the contexts of 128 images have the length of the shortest
  one, which is seldom above 100. None.
* The patch embedding starts as PyTorch's convolutions do, theirs at a deviation of 0.02. None.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.recipes import crops, imagenet


def get_config(arg=None):
    arg = parse_arg(arg, epochs=300, data="", runlocal=False)
    pixels = 32 if arg.runlocal else 224
    config = default_config()
    config.total = f"{arg.epochs} epochs"
    config.batch_size = 2048
    imagenet.use(
        config,
        root=arg.data,
        minival=False,
        # They mirror nothing and change no colors.
        crop=f"decode|{crops.random_crop(pixels, 30, 100, 'bilinear')}",
        eval_pp=crops.evaluation(pixels),
    )
    config.model = {
        "name": "vit_h14",
        "activation": "gelu",
        "initialization": "deit",
        "pooling": "mean",
        "position": "sincos2d_mae",
        "dtype": "bfloat16",
        "residual_dtype": "float32",
    }
    config.task = {
        "name": "ijepa",
        "predictor_width": 384,
        "predictor_depth": 12,
        "context_patches": 128,
        "mask_groups": 1 if arg.runlocal else 16,  # One for each of their GPUs.
        "momentum": [0.996, 1.0],
        **imagenet.STATISTICS,
    }
    config.optim.lr = 1e-3
    config.optim.schedule.update(name="ijepa", warmup="40 epochs", first=0.2, end=1e-3)
    config.optim.weight_decay = 0.04
    config.optim.decay_schedule = {"name": "ijepa", "end": 0.4 / 0.04}
    config.optim.decay_mask = r".*/kernel|.*/mask_token"
    if arg.runlocal:
        imagenet.run_locally(config, width=24, depth=2, num_heads=2, mlp_dim=48, patch_size=4)
        config.task.update(predictor_width=16, predictor_depth=1, min_keep=1, context_patches=24)
    return config
