"""MAE: masked autoencoders pre-trained on ImageNet-1k, and fine-tuned (He et al. 2022).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/mae_b16_i1k.py:epochs=1600 --workdir=runs/mae
    python -m vit_jax train --config=configs/mae_b16_i1k.py:checkpoint=runs/mae \\
        --workdir=runs/mae-finetuned

Arguments: `size=b16` (or `l16`, `h14`); `epochs`, 800 for pre-training, and 100 (b16) or 50 for
fine-tuning; `checkpoint=PATH` fine-tunes what was pre-trained; `data=ROOT`, an image folder in
place of TFDS; `others=real+v2`, further test sets of fine-tuning (see `vit_jax.recipes.imagenet`);
`runlocal` tries it in seconds.

Expected top-1 after pre-training for 1,600 epochs and fine-tuning, %, and the hours of their code
(facebookresearch/mae, FINETUNE.md and PRETRAIN.md); we have not run it:

    size   accuracy        fine-tuning on V100       pre-training
    b16    83.57 (83.66)   32 of them, 7 h 11 min    not given
    l16    85.87 (85.95)   32 of them, 8 h 52 min    64 V100, about 42 h for 800 epochs (then 85.5)
    h14    (86.93)         64 of them, 13 h 9 min    not given

Accuracies are means of four seeds of fine-tuning, with deviations of 0.08 and 0.07, and in
parentheses those of the released files, of which b16 and l16 are the best seeds.

`configs/mae_b16_i1k.csv` holds every setting against theirs. What differs, with the effect we
expect:

* Products are in bfloat16; theirs are in float16 by automatic mixed precision. None.
* Queries, keys and values start as three Xavier draws; theirs are one draw of the joined tensor,
  with a deviation smaller by a factor of 0.7. The class token starts at 0, theirs at a deviation of
  0.02; the patch embedding at a variance of 1 / inputs, theirs as a Xavier draw. Small.
* JPEG files are decoded by TensorFlow and resized pixels are truncated; theirs are decoded by
  Pillow and rounded. None.
* Fine-tuning mixes the whole batch in 32 or 64 groups, one for each of their GPUs. None.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError, nearest
from vit_jax.recipes import crops, deit3, imagenet

# Fine-tuning: (epochs, learning rate for batches of 256, layer decay, drop path, number of GPUs).
SIZES = {
    "b16": (100, 5e-4, 0.65, 0.1, 32),
    "l16": (50, 1e-3, 0.75, 0.2, 32),
    "h14": (50, 1e-3, 0.75, 0.3, 64),
}


def get_config(arg=None):
    arg = parse_arg(arg, size="b16", epochs=0, checkpoint="", data="", others="", runlocal=False)
    if arg.size not in SIZES:
        raise UserError(f"config argument size={arg.size!r}; {nearest(arg.size, SIZES)}")
    pixels = 32 if arg.runlocal else 224
    config = default_config()
    config.model = {
        "name": f"vit_{arg.size}",
        "activation": "gelu",
        "dtype": "bfloat16",
        "residual_dtype": "float32",
    }
    config.task = {"name": "masked"}
    if arg.checkpoint:
        _fine_tune(config, arg, pixels)
    else:
        _pretrain(config, arg, pixels)
    config.task.update(imagenet.STATISTICS)
    if arg.runlocal:
        patch = 4 if arg.size != "h14" else 8
        imagenet.run_locally(config, width=24, depth=2, num_heads=2, mlp_dim=48, patch_size=patch)
        if not arg.checkpoint:
            config.task.decoder = {"width": 16, "depth": 1, "num_heads": 2}
    return config


def _pretrain(config, arg, pixels):
    config.total = f"{arg.epochs or 800} epochs"
    config.batch_size = 4096
    crop = f"{pixels}, 20, ratio_max={4 / 3:.6f}, method='bicubic', antialias=True"
    imagenet.use(
        config,
        root=arg.data,
        minival=False,
        crop=f"decode_jpeg_and_inception_crop({crop}, sampler='torchvision')|flip_lr",
        eval_pp=crops.evaluation(pixels),
    )
    config.task.mask_ratio = 0.75
    config.task.norm_pixels = True
    config.task.decoder = {"width": 512, "depth": 8, "num_heads": 16}
    config.optim.lr = 1.5e-4 * config.batch_size / 256
    config.optim.args = {"b2": 0.95}
    config.optim.weight_decay = 0.05
    # The class token and the mask token have three axes, so that theirs decays them.
    config.optim.decay_mask = r".*/(?:kernel|cls|mask_token)"
    config.optim.schedule.warmup = "40 epochs"


def _fine_tune(config, arg, pixels):
    epochs, rate, layer_decay, drop_path, gpus = SIZES[arg.size]
    config.init.checkpoint = arg.checkpoint
    # The norm of the mean is a new one, as in their code; that of all tokens is left out.
    config.init.initialize = ["backbone/fc_norm/.*"]
    config.init.ignore = ["backbone/norm/.*"]
    config.total = f"{arg.epochs or epochs} epochs"
    config.batch_size = 1024
    deit3.use_images(config, size=pixels, root=arg.data, others=arg.others, fine_tune=True)
    eval_pp = f"decode|resize_small({round(pixels * 8 / 7)}, 'bicubic', True)"
    config.data.eval_pp = f"{eval_pp}|central_crop({pixels})"
    # The class token takes part in the blocks; the mean of the patches is normed and classified.
    pooling = {"pooling": "mean", "class_token": True, "last_norm": False, "fc_norm": True}
    config.model.update(pooling)
    config.model.drop_path = drop_path
    config.task = {
        "name": "classification",
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mixing_groups": gpus,
        "erasing": 0.25,
    }
    config.optim.lr = rate * config.batch_size / 256
    config.optim.weight_decay = 0.05
    config.optim.layer_decay = layer_decay
    config.optim.schedule.warmup = "5 epochs"
    config.optim.schedule.end = 1e-6 / config.optim.lr
