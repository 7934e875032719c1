"""The accuracy of `fashion_mnist.py` for less compute, with settings that change during the run.

    python -m vit_jax train --workdir=runs/fashion-fast \\
        --config=configs/speedrun_fashion_mnist.py:data=/usr/share/datasets/fashion-mnist

All settings are those of that recipe but these:

* Until 60 percent of the run, images have 16×16 pixels, so 16 patches, then 28×28 (49 patches), as
  in progressive resizing (Tan and Le 2021, arXiv:2104.00298, section 4). `curriculum=patches` has
  patches of 7×7 pixels in their place (Anagnostidis et al. 2023, arXiv:2311.03233), of a FlexiViT,
  which resizes its patch kernel (Beyer et al. 2023), after the recipe's `plain`, because a stem of
  convolutions fixes the size of the patches. `curriculum=none` has neither.
* Until then, a quarter of the patches is left out (Liu et al. 2023, PatchDropout), unless `drop=0`.
* Labels are not smoothed in the last tenth of the run, unless `sharpen=False`.

`average=False` leaves out the moving average of the parameters, whose metrics are `test_ema/...`.

`epochs=15` takes about half of the FLOPs of that recipe; `data`, `validate` and `runlocal` are as
there. The FLOPs of each stage, and their share of a run without stages, are printed by `python -m
vit_jax plan` with the same `--config` and `--topology=cpu:1`. We have not run this recipe yet.
"""

from pathlib import Path

from vit_jax.config import load, parse_arg
from vit_jax.errors import UserError, nearest

CURRICULA = ("images", "patches", "none")
EARLY, LATE = "60%", "90%"


def get_config(arg=None):
    arg = parse_arg(
        arg, epochs=15, data="", curriculum="images", drop=0.25, average=True, sharpen=True,
        validate=False, runlocal=False,
    )  # fmt: skip
    if arg.curriculum not in CURRICULA:
        told = nearest(arg.curriculum, CURRICULA)
        raise UserError(f"config argument curriculum={arg.curriculum!r}; {told}")
    own = f'data="{arg.data}",epochs={arg.epochs},validate={arg.validate},runlocal={arg.runlocal}'
    plain = arg.curriculum == "patches"
    config = load(f"{Path(__file__).parent}/fashion_mnist.py:{own},plain={plain}")
    config.unlock()
    if arg.runlocal:
        config.total = 10  # So that each stage has a step.

    early, smooth = {}, {}
    # The positions, and the kernel, are kept as the last stage has them.
    if arg.curriculum == "images":
        config.model.position_grid = (7, 7)
        early["data"] = {"pp": f"{config.data.pp}|resize(16, antialias=True)"}
    elif arg.curriculum == "patches":
        config.model.update({"name": "flexivit_s", "kernel_size": 4, "table_grid": 7})
        early["model"] = {"patch_size": 7}
    if arg.drop:
        early.setdefault("model", {})["patch_drop"] = arg.drop
    if arg.sharpen:
        smooth["task"] = {"label_smoothing": config.task.label_smoothing}
        config.task.label_smoothing = 0.0
    if early:
        config.stages.early = {"until": EARLY, **early, **smooth}
    if smooth:
        config.stages.smooth = {"until": LATE, **smooth}
    if not arg.average:
        config.ema_decay = 0.0
    return config
