"""A run that takes seconds: a tiny ViT on real digits from a NumPy file, without TensorFlow.

Used through the commands (`--config=tests/tiny.py:FILE.npz`) and from fixtures. Most tests need one
program of few operations, which does not depend on the number of steps. With `full=True` a step has
random numbers, micro-batches and a schedule: half the program, and half the time to compile it.
"""

from vit_jax.config import default_config, parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, npz="", steps=12, pictures=False, full=False)
    config = default_config()
    config.total = arg.steps
    config.batch_size = 16
    config.accum_steps = 2 if arg.full else 1
    config.ema_decay = 0.9
    config.model = {
        "name": "vit",
        "patch_size": 4,
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "dropout": 0.1 if arg.full else 0.0,
    }
    config.task = {"name": "classification", "mixup": 0.2 if arg.full else 0.0}
    config.data.source = "npz"
    config.data.name = arg.npz
    config.data.split = "train[:90%]"
    config.eval.sets = {"val": {"split": "train[90%:]"}}
    config.eval.every = 4
    config.eval.batch_size = 16
    config.optim.lr = 3e-3
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 1.0
    config.optim.schedule.name = "cosine" if arg.full else "constant"
    config.optim.schedule.warmup = 2
    config.checkpoint.every = 3
    config.log.every = 1
    config.log.tensorboard = False
    config.log.pictures = arg.pictures
    config.compilation_cache = ""
    return config
