"""DINOv2: DINO and iBOT together, pre-trained on ImageNet-1k (Oquab et al. 2023).

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/dinov2_l14_i1k.py:size=l16 --workdir=runs/dinov2

This is the fast setup of facebookresearch/dinov2, 125,000 steps of 2,048 images, which they give
for patches of 16 pixels (`size=l16`). The default, `l14`, has the patches and the local crops of
their released models and of their long setup, and everything else of the fast one; nobody published
its score. `data=ROOT` is an image folder in place of TFDS; `runlocal` tries it in seconds. The
published backbone is the teacher's.

Expected top-1 on ImageNet, %, on frozen features, with the time of their code
(facebookresearch/dinov2, README.md); we have not run it:

    size   k-NN   linear   hardware
    l16    81.6   82.9     32 A100 of 80 GB, about a day
    l14    not given

`configs/dinov2_l14_i1k.csv` holds every setting against theirs. What differs, with the effect we
expect:

* Products are in bfloat16; theirs are in float16. None.
* KoLeo looks for the nearest image in the whole batch; theirs looks among the 64 of one GPU.
  Small.
* An epoch of theirs is 1,250 steps, so durations are in steps here. None.
* Their `GaussianBlur(p)` gives torchvision 1 - p as the probability, so that they never blur the
  first global crop, and nine of ten second ones. This recipe does what their code does.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError, nearest
from vit_jax.recipes import dinov2, imagenet

# The side of local crops, by the size of the model.
SIZES = {"l14": 98, "l16": 96}


def get_config(arg=None):
    arg = parse_arg(arg, size="l14", data="", runlocal=False)
    if arg.size not in SIZES:
        raise UserError(f"config argument size={arg.size!r}; {nearest(arg.size, SIZES)}")
    config = default_config()
    dinov2.use(
        config,
        data=arg.data,
        sides=(32, 16) if arg.runlocal else (224, SIZES[arg.size]),
        model=f"vit_{arg.size}",
        position_resize_offset=0.1,
    )
    config.task = {
        "name": "dinov2",
        "teacher": "centering",
        "temperature_warmup": 30 * dinov2.EPOCH,
        **imagenet.STATISTICS,
    }
    if arg.runlocal:
        dinov2.run_locally(config)
    return config
