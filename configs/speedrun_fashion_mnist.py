"""The accuracy of `fashion_mnist.py` for less compute, with settings that change during the run.

    python -m vit_jax train --workdir=runs/fashion-fast \\
        --config=configs/speedrun_fashion_mnist.py:data=/usr/share/datasets/fashion-mnist

All settings are those of that recipe but these, each of which an argument switches off:

* `curriculum=False`: until 60 percent of the run, patches have 7×7 pixels (16 an image), then 4×4
  (49). The model is a FlexiViT, which resizes its patch kernel and its positions (Beyer et al.
  2023); large patches first are from Anagnostidis et al. (2023, arXiv:2311.03233).
* `drop=0`: until then, a quarter of the patches is left out (Liu et al. 2023, PatchDropout).
* `muon=False`: Muon trains the kernels of the blocks (Jordan et al. 2024).
* `average=False`: the moving average of the parameters, whose metrics are `test_ema/...`.
* `sharpen=False`: labels are not smoothed in the last tenth of the run.

`epochs=15` is half of that recipe's; `data`, `validate` and `runlocal` are as there. The FLOPs of
each stage, and their share of a run without stages, are printed by `python -m vit_jax plan` with
the same `--config` and `--topology=cpu:1`. We have not run this recipe yet.
"""

from pathlib import Path

from vit_jax.config import load, parse_arg

EARLY, LATE = "60%", "90%"


def get_config(arg=None):
    arg = parse_arg(
        arg, epochs=15, data="", curriculum=True, drop=0.25, muon=True, average=True, sharpen=True,
        validate=False, runlocal=False,
    )  # fmt: skip
    own = f'data="{arg.data}",epochs={arg.epochs},validate={arg.validate},runlocal={arg.runlocal}'
    config = load(f"{Path(__file__).parent}/fashion_mnist.py:{own}")
    config.unlock()
    if arg.runlocal:
        config.total = 10  # So that each stage has a step.

    early, smooth = {"until": EARLY, "model": {}}, {"until": LATE}
    if arg.curriculum:
        # The kernel and the positions are kept as the last stage has them.
        grid = 28 // config.model.patch_size
        kept = {"kernel_size": config.model.patch_size, "table_grid": grid}
        config.model.update({"name": "flexivit_s", **kept})
        early["model"]["patch_size"] = 7
    if arg.drop:
        early["model"]["patch_drop"] = arg.drop
    if arg.sharpen:
        smoothing = {"label_smoothing": config.task.label_smoothing}
        early["task"], smooth["task"] = dict(smoothing), dict(smoothing)
        config.task.label_smoothing = 0.0
        config.stages.smooth = smooth
    if early["model"]:
        config.stages.early = early
    if arg.muon:
        config.optim.name = "muon"
    if not arg.average:
        config.ema_decay = 0.0
    return config
