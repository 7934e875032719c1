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
* KoLeo looks for the nearest image in the whole batch; theirs looks among the 64 of one GPU. Small.
* An epoch of theirs is 1,250 steps, so durations are in steps here. None.
* `high` adds their adaptation to high resolution (section 4 and appendix B.2 of the paper; their
  code has no such part): 10,000 further steps with global crops of 518 pixels (512 for `l16`), as
  the last stage of one run. Theirs is a run of its own that starts from the weights and repeats all
  schedules in 10,000 steps, at a base rate that they do not state; here the schedules, stretched
  over 135,000 steps, come to their ends. The table of positions stays that of 224 pixels and is
  interpolated. Local crops stay as they are, since the paper names no other. We do not know the
  effect.
* Their `GaussianBlur(p)` gives torchvision 1 - p as the probability, so that they never blur the
  first global crop, and nine of ten second ones. This recipe does what their code does.
"""

from vit_jax.config import default_config, parse_arg
from vit_jax.errors import UserError, nearest
from vit_jax.recipes import dinov2, imagenet

# The side of local crops, by the size of the model.
SIZES = {"l14": 98, "l16": 96}
# Of global crops at high resolution.
HIGH = {"l14": 518, "l16": 512}


def get_config(arg=None):
    arg = parse_arg(arg, size="l14", data="", high=False, runlocal=False)
    if arg.size not in SIZES:
        raise UserError(f"config argument size={arg.size!r}; {nearest(arg.size, SIZES)}")
    config = default_config()
    sides = (32, 16) if arg.runlocal else (224, SIZES[arg.size])
    dinov2.use(
        config,
        data=arg.data,
        sides=sides,
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
    if arg.high:
        patch = 4 if arg.runlocal else int(arg.size[1:])
        config.model.position_grid = (sides[0] // patch, sides[0] // patch)
        config.stages = {"low": {"until": config.total, "data": {"pp": config.data.pp}}}
        high = (48, 16) if arg.runlocal else (HIGH[arg.size], SIZES[arg.size])
        config.data.pp = dinov2.crops_of(high)
        config.total += 2 if arg.runlocal else 10_000
    return config
