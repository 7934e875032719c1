"""MLP-Mixer-B/16 on ImageNet-1k alone (Tolstikhin et al. 2021), as big_vision trains it.

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/mixer_b16_i1k.py --workdir=runs/mixer

Arguments: `epochs=300`, `data=ROOT`, `others=real+v2`, `runlocal`.

Expected top-1 on the validation images, % (theirs; we have not run it): 76.3 after 300 epochs in
2 h 11 min on a TPU v3-128, 70.5 after 60 in 27 min (big_vision's `mlp_mixer_i1k`).

The dtype is float32 with the TPU's default precision of products. This stochastic depth divides the
kept branches by the probability of keeping them, so that training and evaluation have the same
mean; theirs does not. At a rate of 0.1 the effect is small and unmeasured. Mixing pairs neighbors
of the whole batch instead of the part of a device; no effect is expected.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.recipes import imagenet


def get_config(arg=None):
    arg = parse_arg(arg, epochs=300, data="", others="", runlocal=False)
    size = 32 if arg.runlocal else 224
    config = default_config()
    config.total = f"{arg.epochs} epochs"
    config.batch_size = 4096

    config.model = {"name": "mixer_b16", "drop_path": 0.1, "head_bias_init": -6.9}
    config.task = {"name": "classification", "loss": "sigmoid", "mixup": 0.5}
    pp = imagenet.big_vision_pp(size, randaug=(2, 15))
    imagenet.use(config, root=arg.data, others=arg.others, **pp)

    config.optim.lr = 1e-3
    config.optim.weight_decay = 1e-4
    config.optim.decay_coupling = "schedule"
    config.optim.clip_norm = 1.0
    config.optim.schedule.name = "linear"
    config.optim.schedule.end = 1e-5
    config.optim.schedule.warmup = 10_000

    if arg.runlocal:
        imagenet.run_locally(config, width=24, depth=2, tokens_mlp_dim=8, channels_mlp_dim=48)
    return config
