"""The operations of timm's RandAugment whose strength increases with the magnitude, by Pillow."""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Outside = int | tuple[int, ...]
# Takes the image, the share of the largest magnitude, its sign, and the value of outer pixels.
Operation = Callable[[Image.Image, float, int, Outside], Image.Image]


def augment(
    images: np.ndarray, draws: np.ndarray, shares: np.ndarray, fill: np.ndarray
) -> np.ndarray:
    """Applies the drawn operations to each image, one after the other.

    Args:
      images: uint8 `[b, h, w, c]`, gray or RGB.
      draws: the places of the operations in `OPERATIONS`, int32 `[b, layers]`; -1 for none.
      shares: the magnitudes divided by the largest one, float32 `[b, layers]`; negative for
        operations in the opposite direction, such as a rotation clockwise.
      fill: the value of pixels from outside the image, uint8 `[b, c]`.
    """
    operations = tuple(OPERATIONS.values())
    out = np.empty_like(images)
    for number, pixels in enumerate(images):
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
        channels = tuple(map(int, fill[number]))
        outside = channels if len(channels) == 3 else channels[0]
        for drawn, share in zip(draws[number], shares[number], strict=True):
            if drawn >= 0:
                sign = -1 if share < 0 else 1
                size = round(abs(float(share)), 6)  # Float32 has 0.9 a little too small.
                image = operations[drawn](image, size, sign, outside)
        out[number] = np.asarray(image).reshape(pixels.shape)
    return out


def _by_value(change: Callable[[int, float], int]) -> Operation:
    """Returns the operation that replaces each value on its own."""

    def apply(image: Image.Image, share: float, _sign: int, _outside: Outside) -> Image.Image:
        return image.point([change(value, share) for value in range(256)] * len(image.getbands()))

    return apply


def _posterized(value: int, share: float) -> int:
    cleared = 4 + int(4 * share)
    return value >> cleared << cleared


def _solarized(value: int, share: float) -> int:
    return value if value < 256 - int(256 * share) else 255 - value


def _lightened(value: int, share: float) -> int:
    return min(value + int(110 * share), 255) if value < 128 else value


def _enhanced(enhancer: Callable) -> Operation:
    """Returns the operation of a class of `ImageEnhance`, for which a factor of 1 does nothing."""
    return lambda image, share, sign, _: enhancer(image).enhance(max(0.1, 1 + sign * 0.9 * share))


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Operation:
    """Returns the operation that moves pixels; `matrix` maps output places to input places."""

    def apply(image: Image.Image, share: float, sign: int, outside: Outside) -> Image.Image:
        numbers = matrix(sign * share, *image.size)
        kind, cubic = Image.Transform.AFFINE, Image.Resampling.BICUBIC
        return image.transform(image.size, kind, numbers, cubic, fillcolor=outside)

    return apply


def _rotated(image: Image.Image, share: float, sign: int, outside: Outside) -> Image.Image:
    return image.rotate(sign * 30 * share, Image.Resampling.BICUBIC, fillcolor=outside)


OPERATIONS: Mapping[str, Operation] = {
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
    "Rotate": _rotated,
    "Posterize": _by_value(_posterized),
    "Solarize": _by_value(_solarized),
    "SolarizeAdd": _by_value(_lightened),
    "Color": _enhanced(ImageEnhance.Color),
    "Contrast": _enhanced(ImageEnhance.Contrast),
    "Brightness": _enhanced(ImageEnhance.Brightness),
    "Sharpness": _enhanced(ImageEnhance.Sharpness),
    "ShearX": _affine(lambda share, *_: (1, 0.3 * share, 0, 0, 1, 0)),
    "ShearY": _affine(lambda share, *_: (1, 0, 0, 0.3 * share, 1, 0)),
    "TranslateX": _affine(lambda share, width, _: (1, 0, 0.45 * share * width, 0, 1, 0)),
    "TranslateY": _affine(lambda share, _, height: (1, 0, 0, 0, 1, 0.45 * share * height)),
}
