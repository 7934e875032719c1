"""ViT-S/16 on ImageNet-1k for less compute: `vit_s16_i1k.py` with images that grow during the run.

    python -m vit_jax prepare imagenet2012
    python -m vit_jax train --config=configs/speedrun_i1k.py --workdir=runs/s16-fast

All settings are those of that recipe but these:

* The quarters of the run have images of 128, 160, 192 and 224 pixels, so 64, 100, 144 and 196
  patches, unless `curriculum=False`. Positions are sines and cosines, so the parameters do not
  depend on the size.
* The magnitude of RandAugment grows with them, 4, 6, 8, 10, unless `grow=False`. That small images
  want little augmentation, and four stages, are from EfficientNetV2 (Tan and Le 2021,
  arXiv:2104.00298, section 4); the numbers are ours.
* With `muon=True`, Muon trains the kernels of the blocks (Jordan et al. 2024).

`epochs`, `data`, `others` and `runlocal` are as there. Evaluations are at 224 pixels throughout.
The mark is the other recipe's 76.5 % after 90 epochs and 80.0 % after 300 (arXiv:2205.01580, table
1). `python -m vit_jax plan` has memory, hours and FLOPs of each stage, and the share of the FLOPs
of a run without stages. We have not run it, and nobody published its score.
"""

from pathlib import Path

from vit_jax.config import load, parse_arg

SIZES, MAGNITUDES = (128, 160, 192, 224), (4, 6, 8, 10)


def get_config(arg=None):
    arg = parse_arg(
        arg, epochs=90, data="", others="", curriculum=True, grow=True, muon=False, runlocal=False
    )
    own = f'{arg.epochs},data="{arg.data}",others="{arg.others}",runlocal={arg.runlocal}'
    config = load(f"{Path(__file__).parent}/vit_s16_i1k.py:{own}")
    config.unlock()
    sizes = (16, 16, 32, 32) if arg.runlocal else SIZES
    if arg.runlocal:
        config.total = len(sizes)  # So that each stage has a step.
    for number in range(len(sizes) - 1) if arg.curriculum or arg.grow else ():
        size = sizes[number if arg.curriculum else -1]
        magnitude = MAGNITUDES[number if arg.grow else -1]
        crop = f"decode_jpeg_and_inception_crop({size})|flip_lr|randaug(2,{magnitude})"
        until = f"{100 * (number + 1) // len(sizes)}%"
        config.stages[f"quarter{number + 1}"] = {"until": until, "data": {"pp": crop}}
    if arg.muon:
        config.optim.name = "muon"
    return config
