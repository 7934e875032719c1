"""Boxes and segmentations on pictures, for contact sheets, reports and predictions alike."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.tracking.plain_text import one_line

if TYPE_CHECKING:
    from PIL import Image, ImageFont

IGNORED = 255
"""Value of a segmentation where nothing is labeled."""

_OPACITY = 0.55
_GOLDEN = 0.618034
_LEAST_FRACTION = 0.01
_LONGEST_TEXT = 200
_MIN_SIDE = 192  # Pixels; smaller pictures are enlarged by whole multiples, so that texts fit.


def class_color(number: int) -> tuple[int, int, int]:
    """Returns the RGB color of a class. The colors of consecutive classes differ strongly."""
    hue, value = (number * _GOLDEN) % 1.0, (1.0, 0.8, 0.65)[number // 8 % 3]
    red, green, blue = (round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.85, value))
    return red, green, blue


def legible_ink(background: np.ndarray) -> str:
    """Returns near-black or near-white, whichever has the higher contrast with a color.

    The contrast is at least 4.5, as WCAG 2.2 asks of text (success criterion 1.4.3). These are not
    the page's text colors, which change on a dark page; cells do not.

    background: red, green and blue, 0..1.
    """
    linear = np.where(
        background <= 0.04045, background / 12.92, ((background + 0.055) / 1.055) ** 2.4
    )
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "#fefefe" if (luminance + 0.05) ** 2 < 1.05 * 0.05 else "#010101"


def font(size: int) -> "ImageFont.FreeTypeFont":
    """Returns DejaVu Sans, which covers most alphabets; Pillow's default font covers only ASCII."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def fitted(text: str, letters: "ImageFont.FreeTypeFont", width: float) -> str:
    """Returns `text` on one line, cut to `width` pixels, with an ellipsis if something is cut."""
    text = one_line(text, _LONGEST_TEXT)
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def rgb(image: np.ndarray) -> np.ndarray:
    """Returns uint8 `[h, w, 3]`, with the extremes of float images at black and white."""
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = ((image - low) * (255 / max(high - low, 1e-6))).round().astype(np.uint8)
    return np.array(np.broadcast_to(image, (*image.shape[:2], 3)))


def enlarged(image: np.ndarray, min_side: int = _MIN_SIDE) -> np.ndarray:
    """Returns `image` enlarged by a whole factor until its longer side has `min_side` pixels."""
    zoom = max(1, -(-min_side // max(image.shape[:2])))
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1)


def with_segmentation(
    image: np.ndarray, segmentation: np.ndarray, *, background: int | None = 0
) -> np.ndarray:
    """Returns `image` as uint8 `[h, w, 3]`, tinted by the class of each pixel.

    Args:
      image: `[h, w, 1 or 3]`.
      segmentation: integers `[h, w]` or `[h, w, 1]`. Pixels that are not labeled turn gray.
      background: the class that is not tinted; None for none.
    """
    segmentation = segmentation.reshape(segmentation.shape[:2])
    picture = rgb(image).astype(np.float32)
    for number in np.unique(segmentation):
        if number != background:
            where = segmentation == number
            ignored = number == IGNORED or number < 0
            color = (128, 128, 128) if ignored else class_color(int(number))
            picture[where] += _OPACITY * (np.array(color, np.float32) - picture[where])
    return picture.round().astype(np.uint8)


def with_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    texts: Sequence[str],
) -> np.ndarray:
    """Returns `image` as uint8 `[h, w, 3]`, enlarged if small, with boxes and a text at each.

    Args:
      image: `[h, w, 1 or 3]`.
      boxes: `[n, 4]` as (y0, x0, y1, x1), each in 0..1 of the image.
      labels: the classes, which decide the colors.
      texts: one for each box; "" for none.
    """
    from PIL import Image, ImageDraw

    picture = Image.fromarray(enlarged(rgb(image)))
    draw = ImageDraw.Draw(picture)
    for box, label, text in zip(boxes, labels, texts, strict=True):
        y0, x0, y1, x1 = np.clip(box, 0, 1) * np.tile((picture.height, picture.width), 2)
        color = class_color(int(label))
        corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
        draw.rectangle(corners, outline=color, width=2)
        if text:
            _write(picture, text, color, (x0, y0))
    return np.asarray(picture)


def with_names(
    picture: np.ndarray,
    segmentation: np.ndarray,
    names: Sequence[str],
    *,
    background: int | None = 0,
) -> np.ndarray:
    """Returns a segmented picture as uint8 `[h, w, 3]`, enlarged if small, with names of classes.

    The name of a class is drawn at the pixel of the class that is nearest to the mean position of
    its pixels. Classes that cover less than `_LEAST_FRACTION` of the picture get no name.
    """
    from PIL import Image

    written = Image.fromarray(enlarged(picture))
    zoom = written.height / segmentation.shape[0]
    segmentation = segmentation.reshape(segmentation.shape[:2])
    for number in np.unique(segmentation):
        places = np.argwhere(segmentation == number)
        is_small = len(places) < _LEAST_FRACTION * segmentation.size
        if is_small or number == background or not 0 <= number < len(names):
            continue
        y, x = places[np.square(places - places.mean(0)).sum(1).argmin()] * zoom
        _write(written, names[number], class_color(int(number)), (x, y + zoom))
    return np.asarray(written)


def _write(
    picture: "Image.Image", text: str, color: tuple[int, int, int], place: tuple[float, float]
) -> None:
    """Draws a framed text with its lower left corner at `place` (x, y), moved if cut there."""
    from PIL import ImageDraw

    draw, letters = ImageDraw.Draw(picture), font(12)
    text = fitted(text, letters, picture.width - 4)
    left, _, right, bottom = draw.textbbox((0, 0), text, letters)
    x = max(0, min(place[0], picture.width - right - 4))
    y = max(0, place[1] - bottom - 3)
    draw.rectangle((x, y, x + right - left + 4, y + bottom + 3), fill=color)
    draw.text((x + 2, y + 1), text, legible_ink(np.divide(color, 255)), letters)
