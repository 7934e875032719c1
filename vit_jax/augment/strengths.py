"""What RandAugment's operations are at a strength, before any image is seen (Cubuk et al. 2020).

Tables and matrices in NumPy, for the host (`data.ops.randaugment`) and the device
(`tasks._randaugment`) alike. Magnitudes go from 0 to 10 in the paper, here to `STRONGEST`; `level`
is a tenth of one. `corrected` takes out three oddities of the published runs: Solarize's threshold
wraps at 256, so that magnitude 10 inverts the whole image; Contrast moves away from a grey that
depends on the image's size; and moves and holes are up to 100 and 80 pixels, whatever that size is.
"""

import math

import numpy as np

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout",
    "SolarizeAdd",
)  # fmt: skip
STRONGEST = 20.0
"""Magnitude; published recipes go from 0 to this one, at which `Rotate` turns by 60 degrees."""
FILL = 128
"""What comes in from outside of an image, and hides a part of it."""
IDENTITY = np.float32([[1, 0, 0], [0, 1, 0]])


def enhancement(level: float) -> np.float32:
    """The factor of Color, Contrast, Brightness and Sharpness."""
    return np.float32(level * 1.8 + 0.1)


def half_side(level: float, height: int, corrected: bool) -> int:
    """Half the side of what Cutout hides."""
    return int(_scaled(level * 40.0, height, corrected))


def fixed_tables(level: float, size: tuple[int, int], corrected: bool) -> np.ndarray:
    """What each value becomes, where that is the same for every image of (height, width).

    uint8 `[operations, 256]`; the value itself for the other operations.
    """
    values = np.arange(256)
    enhance = enhancement(level)
    threshold, addition = int(level * 256), int(level * 110)
    if not corrected:
        threshold %= 256
    cleared = min(8 - int(level * 4), 7)
    by_size = np.float32(min(size[0] * size[1] // 256, 255))
    tables = {
        "Invert": 255 - values,
        "Posterize": values >> cleared << cleared,
        "Solarize": np.where(values >= threshold, 255 - values, values),
        "SolarizeAdd": np.where(values < 128, np.minimum(values + addition, 255), values),
        "Brightness": enhance * np.float32(values),
        "Contrast": by_size + enhance * (np.float32(values) - by_size),
    }
    rows = [tables.get(name, values) for name in OPERATIONS]
    return np.clip(rows, 0, 255).astype(np.uint8)


def matrices(level: float, size: tuple[int, int], corrected: bool) -> np.ndarray:
    """Where the operations read, both ways each: float32 `[operations, 2, 2, 3]`.

    The output pixel (x, y) is the one at `matrix @ (x, y, 1)` of the input.
    """
    found = np.tile(IDENTITY, (len(OPERATIONS), 2, 1, 1))
    for negative, sign in enumerate(np.float32([1, -1])):
        of = dict(zip(OPERATIONS, found[:, negative], strict=True))
        of["Rotate"][:] = _rotation(sign * np.float32(level) * np.float32(30), size)
        of["ShearX"][0, 1] = of["ShearY"][1, 0] = sign * level * 0.3
        for name, axis, side in (("TranslateX", 0, size[1]), ("TranslateY", 1, size[0])):
            shift = np.round(sign * _scaled(level * 100.0, side, corrected))
            of[name][axis, 2] = np.clip(shift, -side, side)
    return found


def _scaled(pixels: float, side: int, corrected: bool) -> np.float32:
    """A length for images of side 224; only `corrected` measures others by their own side."""
    return np.float32(pixels) * np.float32(side) / 224 if corrected else np.float32(pixels)


def _rotation(degrees: np.float32, size: tuple[int, int]) -> np.ndarray:
    """About the centre, counter-clockwise; float32 throughout, as the published runs had it."""
    angle = degrees * np.float32(math.pi / 180)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    bottom, right = np.float32(size) - 1
    x = (right - (cos * right - sin * bottom)) / 2
    y = (bottom - (sin * right + cos * bottom)) / 2
    return np.stack([[cos, -sin, x], [sin, cos, y]])
