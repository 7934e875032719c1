"""Fine-tunes a released Vision Transformer as Dosovitskiy et al. 2021 do (appendix B.1.1, table 4).

    python -m vit_jax prepare cifar10
    python -m vit_jax train --workdir=runs/cifar10 \\
        --config=configs/finetune.py:model=vit_b16,dataset=cifar10,checkpoint=ViT-B_16.npz

`dataset` is a preset below, any name of TFDS, or a folder of images: ROOT/SPLIT/CLASS/*.jpg, or
ROOT/CLASS/*.jpg with split=train[:90%],test=train[90%:]. `checkpoint` is of any format that
`vit_jax.checkpoints.load` reads; `python -m vit_jax models` lists the models. `vtab` trains on
1,000 examples (Zhai et al. 2019), `lora=8` trains adapters of that rank in place of the kernels
(Hu et al. 2021), `runlocal` tries the configuration in seconds.

Momentum SGD in batches of 512 at 384 px, cosine decay, gradients clipped at norm 1, no weight
decay, a new head. The learning rate is the one setting that the paper chooses for each model and
dataset, from 0.001, 0.003, 0.01 and 0.03 (ImageNet: 0.003 to 0.06; VTAB: 0.01), on a part of the
training split:

    for lr in 0.03 0.01 0.003; do
      python -m vit_jax train --workdir=runs/cifar10-$lr --config.optim.lr=$lr \\
          --config=configs/finetune.py:dataset=cifar10,checkpoint=ViT-B_16.npz,test=train[98%:]
    done

Expected accuracy, % (the table of vision_transformer's README, without dropout; there, A100s whose
number is not given took the hours in brackets). We have not run these:

    model, pre-trained on ImageNet-21k     cifar10         cifar100        imagenet2012
    vit_b32                                98.88 (0.8 h)   92.31 (0.8 h)   81.66 (3.3 h)
    vit_b16                                99.02 (2.2 h)   92.06 (2.2 h)   84.53 (6.5 h)
    vit_l32                                99.06 (1.9 h)   93.29 (1.9 h)   81.89 (7.5 h)
    vit_l16                                99.13 (6.9 h)   92.91 (6.9 h)   84.47 (16.8 h)

One device that cannot hold the batch takes it in parts: --config.accum_steps=8.
"""

from pathlib import Path

from vit_jax.config import default_config, parse_arg

# dataset: (training split, test split, steps, steps of warm-up)
PRESETS = {
    "cifar10": ("train[:98%]", "test", 10_000, 500),
    "cifar100": ("train[:98%]", "test", 10_000, 500),
    "imagenet2012": ("train[:99%]", "validation", 20_000, 500),
    "oxford_flowers102": ("train", "test", 500, 100),
    "oxford_iiit_pet": ("train", "test", 500, 100),
}
VTAB = ("train[:1000]", "test", 2_500, 500)


def get_config(arg=None):
    arg = parse_arg(
        arg,
        model="vit_b16",
        dataset="cifar10",
        checkpoint="",
        size=384,
        split="",
        test="",
        lora=0,
        vtab=False,
        runlocal=False,
    )
    config = default_config()
    preset = VTAB if arg.vtab else PRESETS.get(arg.dataset, ("train", "test", 2_500, 100))
    train_split, test_split, config.total, config.optim.schedule.warmup = preset
    config.batch_size = 512

    size = 32 if arg.runlocal else arg.size
    config.model = {"name": arg.model}
    config.task = {"name": "classification"}
    config.init.checkpoint = arg.checkpoint
    config.init.head = "zero"
    if arg.lora:
        config.task.lora = {"rank": arg.lora}

    config.data.source = "folder" if Path(arg.dataset).is_dir() else "tfds"
    config.data.name = arg.dataset
    config.data.split = arg.split or train_split
    config.data.pp = f"decode_jpeg_and_inception_crop({size})|flip_lr"
    config.data.eval_pp = f"decode|resize({size})"
    config.eval.sets = {"test": {"split": arg.test or test_split}}

    config.optim.name = "sgd"
    config.optim.args = {"momentum": 0.9, "momentum_dtype": "bfloat16"}
    config.optim.lr = 0.01
    config.optim.clip_norm = 1.0

    if arg.runlocal:
        config.batch_size = 8
        config.total = 4
        config.optim.schedule.warmup = 1
        if not arg.checkpoint:
            config.model.update(depth=2)
    return config
