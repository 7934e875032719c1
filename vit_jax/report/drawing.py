"""Boxes and segmentations on pictures: the same look in contact sheets, reports and predictions."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageFont

IGNORED = 255
"""Value of a segmentation where nothing is labelled."""

_OPACITY = 0.55
_GOLDEN = 0.618034
_LEAST_SHARE = 0.01
_MIN_SIDE = 192  # Pixels; smaller pictures are enlarged by whole multiples, so that texts fit.


def class_colour(number: int) -> tuple[int, int, int]:
    """RGB of a class; neighbours differ strongly, and a class always looks the same."""
    hue, value = (number * _GOLDEN) % 1.0, (1.0, 0.8, 0.65)[number // 8 % 3]
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.85, value))


def font(size: int) -> "ImageFont.FreeTypeFont":
    """DejaVu Sans, which has the letters of most alphabets; Pillow's own has those of ASCII."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def rgb(image: np.ndarray) -> np.ndarray:
    """uint8 `[h, w, 3]`; float images are stretched so that their extremes are black and white."""
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = ((image - low) * (255 / max(high - low, 1e-6))).round().astype(np.uint8)
    return np.array(np.broadcast_to(image, (*image.shape[:2], 3)))


def enlarged(image: np.ndarray, min_side: int = _MIN_SIDE) -> np.ndarray:
    """`image` repeated by a whole number of pixels, so that its longer side is `min_side`."""
    zoom = max(1, -(-min_side // max(image.shape[:2])))
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1)


def with_segmentation(
    image: np.ndarray, segmentation: np.ndarray, *, background: int | None = 0
) -> np.ndarray:
    """uint8 `[h, w, 3]`: `image` tinted by the class of each pixel.

    segmentation: integers `[h, w]` or `[h, w, 1]`. background: the class that stays clear; None for
    none. Ignored pixels turn grey.
    """
    segmentation = segmentation.reshape(segmentation.shape[:2])
    picture = rgb(image).astype(np.float32)
    for number in np.unique(segmentation):
        if number != background:
            where = segmentation == number
            ignored = number == IGNORED or number < 0
            colour = (128, 128, 128) if ignored else class_colour(int(number))
            picture[where] += _OPACITY * (np.array(colour, np.float32) - picture[where])
    return picture.round().astype(np.uint8)


def with_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    texts: Sequence[str],
) -> np.ndarray:
    """uint8 `[h, w, 3]`, enlarged if it is small: `image` with boxes, each with a text.

    boxes: `[n, 4]` as (y0, x0, y1, x1) in 0..1 of the image. labels: decide the colours.
    """
    from PIL import Image, ImageDraw

    picture = Image.fromarray(enlarged(rgb(image)))
    draw = ImageDraw.Draw(picture)
    for box, label, text in zip(boxes, labels, texts, strict=True):
        y0, x0, y1, x1 = np.clip(box, 0, 1) * np.tile((picture.height, picture.width), 2)
        colour = class_colour(int(label))
        corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
        draw.rectangle(corners, outline=colour, width=2)
        if text:
            _write(picture, text, colour, (x0, y0))
    return np.asarray(picture)


def with_names(
    picture: np.ndarray,
    segmentation: np.ndarray,
    names: Sequence[str],
    *,
    background: int | None = 0,
) -> np.ndarray:
    """uint8 `[h, w, 3]`, enlarged if it is small: a segmented picture with its classes' names.

    Each stands on the pixel of its class that is nearest to their middle; what covers less than
    `_LEAST_SHARE` has none.
    """
    from PIL import Image

    segmentation = segmentation.reshape(segmentation.shape[:2])
    written = Image.fromarray(enlarged(picture))
    zoom = written.height / segmentation.shape[0]
    for number in np.unique(segmentation):
        places = np.argwhere(segmentation == number)
        is_small = len(places) < _LEAST_SHARE * segmentation.size
        if is_small or number == background or not 0 <= number < len(names):
            continue
        y, x = places[np.square(places - places.mean(0)).sum(1).argmin()] * zoom
        _write(written, names[number], class_colour(int(number)), (x, y + zoom))
    return np.asarray(written)


def _write(
    picture: "Image.Image", text: str, colour: tuple[int, int, int], place: tuple[float, float]
) -> None:
    """A framed text whose lower left corner is at `place` (x, y), moved where it would be cut."""
    from PIL import ImageDraw

    draw, letters = ImageDraw.Draw(picture), font(12)
    left, _, right, bottom = draw.textbbox((0, 0), text, letters)
    x = max(0, min(place[0], picture.width - right - 4))
    y = max(0, place[1] - bottom - 3)
    draw.rectangle((x, y, x + right - left + 4, y + bottom + 3), fill=colour)
    draw.text((x + 2, y + 1), text, _ink(colour), letters)


def _ink(colour: tuple[int, int, int]) -> str:
    """What is read best on a colour, by its luma (ITU-R BT.601)."""
    return "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 128 else "white"
