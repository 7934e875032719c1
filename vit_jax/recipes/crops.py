"""The crops that DINO and its successors train on, which several recipes share.

    config.data.pp = crops.multi_crop(area=40)

The numbers that are fixed here are those of facebookresearch/dino (main_dino.py,
`DataAugmentationDINO`), which DINOv2 took over.
"""

COLORS = "color_jitter(0.4, 0.4, 0.2, hue=0.1, probability=0.8)|grayscale(0.2)"
SMALLEST = 5
"""The least area of a local crop, in percent of the image."""


def multi_crop(
    *,
    area: int,
    sides: tuple[int, int] = (224, 96),
    num_local: int = 8,
    blurs: tuple[float, float, float] = (1.0, 0.1, 0.5),
    radius: int = 6,
) -> str:
    """Returns the preprocessing of two global crops and several local ones, and of nothing else.

    Args:
      area: in percent, the least area of global crops and the largest of local ones.
      sides: of global and of local crops, in pixels.
      num_local: the number of local crops.
      blurs: the probability of a blur of the first and the second global crop and of local ones.
        The second global crop is also solarized, with a probability of 0.2.
      radius: at which the blur is cut off, in pixels.
    """
    first, second, local = (f"|gaussian_blur({share}, radius={radius})" for share in blurs)
    large, small = (
        f"{random_crop(side, low, high)}|flip_lr|{COLORS}"
        for side, low, high in ((sides[0], area, 100), (sides[1], SMALLEST, area))
    )
    return (
        f"decode|views('global', 1, \"{large}{first}\")"
        f"|views('global', 1, \"{large}{second}|solarize(0.2)\")"
        f"|views('local', {num_local}, \"{small}{local}\")|keep('global', 'local')"
    )


def random_crop(side: int, low: int, high: int, method: str = "bicubic") -> str:
    """Returns torchvision's `RandomResizedCrop` of an area from `low` to `high` percent."""
    return (
        f"inception_crop({side}, {low}, {high}, ratio_max={4 / 3:.6f}, method='{method}',"
        " antialias=True, sampler='torchvision')"
    )


def evaluation(side: int) -> str:
    """Returns the central crop of an image whose shorter side is 8/7 of it."""
    return f"decode|resize_small({round(side * 8 / 7)}, 'bicubic', True)|central_crop({side})"
