"""A ResNet-50x1 with group norm on ImageNet-1k alone, as big_vision trains it: `bit_i1k`.

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/bit_r50_i1k.py --workdir=runs/r50

Arguments: `model=bit_v1_r50x1`, `epochs=90`, `data=ROOT`, `others=real+v2`, `runlocal`.

The network is post-activation, with norms on the shortcuts and last norms that start at zero.
`model=bit_r50x1` takes the pre-activation network of the paper instead (Kolesnikov et al. 2020;
big_vision's `models/bit_paper.py`), by the same training.

big_vision's `bit_i1k` takes about 32 minutes on a TPU v3-128 and states no accuracy; we have not
run it. For comparison, a distilled ResNet-50 of the same shape reaches 82.8 % at 224 px (Beyer et
al. 2022, arXiv:2106.05237; `config.task.distill` is how).

Float32 with the TPU's default precision of products, momentum in bfloat16.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.recipes import imagenet


def get_config(arg=None):
    arg = parse_arg(arg, model="bit_v1_r50x1", epochs=90, data="", others="", runlocal=False)
    size = 32 if arg.runlocal else 224
    config = default_config()
    config.total = f"{arg.epochs} epochs"
    config.batch_size = 4096

    config.model = {"name": arg.model}
    config.task = {"name": "classification"}
    imagenet.use(config, root=arg.data, others=arg.others, **imagenet.big_vision_pp(size))

    # Both are proportional to the batch size: 0.1 and 1e-4 for 256 images.
    config.optim.name = "sgd"
    config.optim.args = {"momentum": 0.9, "momentum_dtype": "bfloat16"}
    config.optim.lr = 0.1 * config.batch_size / 256
    config.optim.weight_decay = 1e-4 * config.batch_size / 256
    config.optim.decay_coupling = "schedule"
    config.optim.clip_norm = 1.0
    config.optim.schedule.warmup = 1000

    if arg.runlocal:
        imagenet.run_locally(config, stages=(1, 1), width_factor=0.5)
    return config
