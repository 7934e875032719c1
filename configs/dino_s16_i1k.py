"""DINO: self-distillation without labels, pre-trained on ImageNet-1k (Caron et al. 2021).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/dino_s16_i1k.py --workdir=runs/dino
    python -m vit_jax train --config=configs/dino_s16_i1k.py:b16 --workdir=runs/dino-b16

Arguments: `b16` for a ViT-B/16; `epochs`, 300 (b16: 400); `data=ROOT`, an image folder in place of
TFDS; `runlocal` tries it in seconds. The published backbone is the teacher's.

Expected top-1 on ImageNet, %, on frozen features, with the time of their code
(facebookresearch/dino, README.md, and table 2 of the paper); we have not run it:

    size   epochs   k-NN (20)   linear   hardware
    s16    300      73.3        76.1     16 GPUs, 2.6 days
    b16    400      76.1        78.2     32 GPUs

S/16 is the command that the README calls "boosting". B/16 is the released model, whose arguments
(dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/args.txt) we have only from others who quote
them.

What differs from theirs, with the effect we expect:

* Products are in bfloat16; theirs are in float16 by automatic mixed precision, those of B/16 in
  float32. None.
* The blur is a Gaussian cut off at 6 pixels; theirs is PIL's approximation by three box filters.
  Hues are computed in float32; PIL rounds them to 256. None.
* A last batch that is not full takes images of the next epoch; theirs is dropped. None.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError, nearest
from vit_jax.recipes import crops, imagenet

SIZES = ("s16", "b16")


def get_config(arg=None):
    arg = parse_arg(arg, size="s16", epochs=0, data="", runlocal=False)
    if arg.size not in SIZES:
        raise UserError(f"config argument size={arg.size!r}; {nearest(arg.size, SIZES)}")
    base = arg.size == "b16"
    config = default_config()
    config.total = f"{arg.epochs or (400 if base else 300)} epochs"
    config.batch_size = 1024
    sides = (32, 16) if arg.runlocal else (224, 96)
    imagenet.use(
        config,
        root=arg.data,
        minival=False,
        crop=crops.multi_crop(area=25, sides=sides, num_local=10)
        if base
        else crops.multi_crop(area=40, sides=sides),
        eval_pp=crops.evaluation(sides[0]),
    )
    config.model = {
        "name": f"vit_{arg.size}",
        "activation": "gelu",
        "initialization": "deit",
        "drop_path": 0.1,
        # They add 0.1 to the number of rows and columns where they resize the table for crops.
        "position_resize_offset": 0.1,
        "dtype": "bfloat16",
        "residual_dtype": "float32",
    }
    config.task = {
        "name": "dino",
        "temperature": [0.04, 0.07],
        "temperature_warmup": f"{50 if base else 30} epochs",
        **imagenet.STATISTICS,
    }
    config.optim.lr = (7.5e-4 if base else 5e-4) * config.batch_size / 256
    end = 2e-6 if base else 1e-6
    config.optim.schedule.update(name="dino", warmup="10 epochs", end=end / config.optim.lr)
    config.optim.weight_decay = 0.04
    config.optim.decay_schedule = {"name": "dino", "end": 0.4 / 0.04}
    # Theirs decays all but biases and vectors; the lengths of prototypes have two axes there.
    config.optim.decay_mask = r".*/kernel|.*/(?:cls|pos_embed)|dino_head/prototypes/scale"
    config.optim.clip_norm, config.optim.clip_scope = 0.3 if base else 3.0, "parameter"
    # The prototypes stay in the first epochs, and in B/16 their lengths are always 1.
    config.optim.freeze_until = [["dino_head/prototypes/.*", f"{3 if base else 1} epochs"]]
    config.optim.freeze = ["dino_head/prototypes/scale"] if base else []
    if arg.runlocal:
        imagenet.run_locally(config, width=24, depth=2, num_heads=2, mlp_dim=48, patch_size=4)
        config.task.update(num_prototypes=32, head_hidden=32, head_bottleneck=16)
        config.task.temperature_warmup = 1
        config.optim.freeze_until = [["dino_head/prototypes/.*", 1]]
    return config
