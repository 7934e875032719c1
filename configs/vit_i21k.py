"""Pre-training of ViTs on ImageNet-21k (Steiner et al. 2022), and of larger ones to plan with.

    python -m vit_jax train --config=configs/vit_i21k.py:vit_b16,data=/data/imagenet21k \\
        --workdir=gs://BUCKET/b16-i21k
    python -m vit_jax plan --config=configs/vit_i21k.py:vit_G14 --topology=v5p:8x8x16

ImageNet-21k is not in TFDS: `data` is a folder `ROOT/SYNSET/*.JPEG`, or the name of a TFDS dataset
of your own. Without it, the images are random, with the same numbers of images and classes, which
is sufficient for plans and benchmarks. Other arguments: `model=vit_b16`, `aug` of the paper's
settings, `epochs=300`, `size=224`, `runlocal`.

Up to L/16 this is big_vision's `vit_i21k`, which averages the tokens and has no class token; of its
products no score is published. The paper's own runs have a class token
(`--config.model.pooling=token`). Fine-tuned to ImageNet-1k at 384 px by `augreg.py`, which takes
the pooling of the run that it starts from, they reach Ti/16 78.22, S/16 83.73, B/16 85.49, L/16
85.59 % (table 3; theirs). Those of B and L had more augmentation than these defaults (`aug=medium1`
and `aug=strong1`), and those of Ti and S less decay: `--config.optim.weight_decay=3e-5`, which is
0.03 in their file names. From H/14 on it is the recipe of "Scaling Vision Transformers" (Zhai et
al. 2022, sections 3.3 to 3.5) on this smaller set: Adafactor with bfloat16 momentum, reciprocal
square root with cool-down, attention pooling, 100 times the decay on the head; nobody has published
its score. We have run neither. Their code (big_vision's `proj/scaling_laws/train_vit_g.py`) has
batches of 16,384 for a million steps on JFT-3B, in float32. Here they are of 4,096 for 300 epochs,
in bfloat16, to need less hardware, so the result will be another one.

B/16 fits a TPU v3-128 (10.6 of 16 GiB a core), where 300 epochs would take 52 hours at 30 % of the
peak, L/16 a v3-512 (11.7 GiB) and 46 hours (by `plan`; docs/planning.md has the larger ones).

Float32 with the TPU's default precision of products; bfloat16 from H/14 on. Mixing pairs neighbors
of the whole batch instead of the part of a device; no effect is expected.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError, nearest
from vit_jax.recipes import imagenet

BEST = {
    "vit_ti16": "none",
    "vit_s32": "none",
    "vit_s16": "light1",
    "vit_b32": "light2",
    "vit_b16": "light2",
    "vit_l16": "medium2",
}
NUM_EXAMPLES = 14_197_122
LARGE = ("vit_h14", "vit_g14", "vit_G14")


def get_config(arg=None):
    arg = parse_arg(
        arg,
        model="vit_b16",
        aug="",
        data="",
        epochs=300,
        size=224,
        runlocal=False,
    )
    if arg.model not in (*BEST, *LARGE):
        suggestion = nearest(arg.model, [*BEST, *LARGE])
        raise UserError(f"config argument model={arg.model!r}; {suggestion}")
    mixup, *randaug = imagenet.augreg(arg.aug or BEST.get(arg.model, "none"))
    size = 28 * (arg.model in LARGE) or 32 if arg.runlocal else arg.size
    config = default_config()
    config.total = f"{arg.epochs} epochs"
    config.batch_size = 4096

    config.model = {
        "name": arg.model,
        "initialization": "big_vision",
        "pooling": "mean",
        "head_bias_init": -10.0,  # -log(21,843)
    }
    config.task = {"name": "classification", "loss": "sigmoid", "mixup": mixup}
    pp = imagenet.big_vision_pp(size, randaug)
    is_folder = "/" in arg.data
    config.data.source = "folder" if is_folder else "tfds" if arg.data else "fake"
    config.data.name = arg.data or "imagenet21k"
    if is_folder:
        config.data.args = dict(imagenet.AS_STORED)
    if not arg.data:
        config.data.args = {"num_examples": NUM_EXAMPLES, "num_classes": 21_843, "encoded": True}
    config.data.split = "train[51200:]"
    config.data.pp = pp["crop"] + pp["augment"]
    config.data.eval_pp = pp["eval_pp"]
    config.data.on_bad_image = "skip" if is_folder else "fail"
    config.eval.sets = {
        "test": {"split": "train[:25600]"},
        "val": {"split": "train[25600:51200]"},
    }

    imagenet.big_vision_adamw(config)
    if arg.model in LARGE:
        _scale_up(config)

    if arg.runlocal:
        imagenet.run_locally(config, width=24, depth=2, num_heads=2, mlp_dim=48)
    return config


def _scale_up(config):
    """Applies the changes of "Scaling Vision Transformers" and reduces the memory of a chip."""
    config.model.update(pooling="map", remat="dots_with_no_batch_dims_saveable", dtype="bfloat16")
    config.mesh.fsdp, config.mesh.data = -1, 1
    config.optim.name, config.optim.args = "adafactor", {}
    config.optim.lr = 8e-4
    # Section 3.1: 0.03 for the body and 3.0 for the head, of a decay that is multiplied by lr.
    config.optim.decay_coupling = "lr"
    config.optim.weight_decay = 0.03
    config.optim.decay_mults = [["head/.*", 100.0]]
    config.optim.schedule.name = "rsqrt"
    config.optim.schedule.cooldown = 50_000
