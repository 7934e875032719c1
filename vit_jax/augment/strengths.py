"""The tables and matrices of RandAugment's operations at a given strength (Cubuk et al. 2020).

They depend on no pixel, so NumPy computes them once, for the host (`data.ops.randaugment`) and the
device (`augment.randaugment`) alike. As in the published code, strengths are computed in double
precision and rounded to float32 once, at the end: a second rounding would move a shear by one unit
in the last place, and with it some pixels.

Magnitudes go from 0 to 10 in the paper and to `STRONGEST` here; `level` is magnitude / 10.
`corrected` removes three oddities of the published runs: Solarize's threshold wraps at 256, so that
magnitude 10 inverts the whole image; Contrast moves away from a gray that depends on the image's
size; and translations and holes are up to 100 and 80 pixels, for images of any size.
"""

import math
from collections.abc import Sequence

import numpy as np

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout",
    "SolarizeAdd",
)  # fmt: skip
STRONGEST = 30.0
"""The largest magnitude, at which `Rotate` turns by 90 degrees. Published recipes reach 20."""
FILL = 128
"""The value of pixels from outside the image, and of the pixels that Cutout hides."""
IDENTITY = np.array([[1, 0, 0], [0, 1, 0]], np.float32)


def enhancement(level: float) -> np.float32:
    """Returns the factor of Color, Contrast, Brightness and Sharpness."""
    return np.float32(level * 1.8 + 0.1)


def half_side(level: float, height: int, corrected: bool) -> int:
    """Returns half the side of the square that Cutout hides, in pixels."""
    return int(_scaled(level * 40.0, height, corrected))


def fixed_tables(level: float, size: Sequence[int], corrected: bool) -> np.ndarray:
    """Returns the new value of each pixel value, for operations that treat all images alike.

    Args:
      level: magnitude / 10.
      size: (height, width) of the images.
      corrected: see the top of this file.

    Returns:
      uint8 `[operations, 256]`; the rows of the other operations change nothing.
    """
    values = np.arange(256)
    enhance = enhancement(level)
    threshold, addition = int(level * 256), int(level * 110)
    if not corrected:
        threshold %= 256
    cleared = min(max(8 - int(level * 4), 0), 7)
    by_size = np.float32(min(size[0] * size[1] // 256, 255))
    tables: dict[str, np.ndarray] = {
        "Invert": 255 - values,
        "Posterize": values >> cleared << cleared,
        "Solarize": np.where(values >= threshold, 255 - values, values),
        "SolarizeAdd": np.where(values < 128, np.minimum(values + addition, 255), values),
        "Brightness": enhance * values.astype(np.float32),
        "Contrast": by_size + enhance * (values.astype(np.float32) - by_size),
    }
    rows = np.stack([tables.get(name, values) for name in OPERATIONS])
    return np.clip(rows, 0, 255).astype(np.uint8)


def matrices(level: float, size: Sequence[int], corrected: bool) -> np.ndarray:
    """Returns the matrix of each geometric operation, for both signs of its strength.

    The output pixel (x, y) is read at `matrix @ (x, y, 1)` of the input.

    Args:
      level: magnitude / 10.
      size: (height, width) of the images.
      corrected: see the top of this file.

    Returns:
      float32 `[operations, 2, 2, 3]`; the second axis is the sign, positive first. The matrices of
      the other operations are `IDENTITY`.
    """
    found = np.tile(IDENTITY, (len(OPERATIONS), 2, 1, 1))
    for negative, sign in enumerate((1.0, -1.0)):
        of = dict(zip(OPERATIONS, found[:, negative], strict=True))
        of["Rotate"][:] = _rotation(np.float32(sign * (level * 30.0)), size)
        of["ShearX"][0, 1] = of["ShearY"][1, 0] = np.float32(sign * (level * 0.3))
        for name, axis, side in (("TranslateX", 0, size[1]), ("TranslateY", 1, size[0])):
            shift = np.round(np.float32(sign) * _scaled(level * 100.0, side, corrected))
            of[name][axis, 2] = np.clip(shift, -side, side)
    return found


def _scaled(pixels: float, side: int, corrected: bool) -> np.float32:
    """Returns a length for images of side 224; `corrected` scales it with the image's own side."""
    return np.float32(pixels) * np.float32(side) / 224 if corrected else np.float32(pixels)


def _rotation(degrees: np.float32, size: Sequence[int]) -> np.ndarray:
    """Returns the counter-clockwise rotation about the center, in float32 as in published runs."""
    angle = degrees * np.float32(math.pi / 180)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    bottom, right = np.array(size, np.float32) - 1
    x = (right - (cos * right - sin * bottom)) / 2
    y = (bottom - (sin * right + cos * bottom)) / 2
    return np.stack([[cos, -sin, x], [sin, cos, y]])
