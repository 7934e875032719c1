"""Handwritten digits on photographs, with exact boxes, masks and a caption; no network needed.

Digits and photographs are real and come with scikit-learn: a scene has one to four of the digits of
`digits`, at varied size and contrast, on a crop of one of the photographs `china.jpg` and
`flower.jpg`. Training digits are slightly rotated, slanted, and stretched. Test scenes use only
undistorted digits of the test split (other writers) and the right quarter of the photographs, which
no training scene shows. A scene is a pure function of (seed, index), its split, and the side of its
image.

The mask of a digit has the pixels of which ink covers at least half; its box is the tightest box
around the mask. Digits do not overlap.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

NUM_TRAIN_DIGITS = 1437
"""The number of scikit-learn's digits for training, from the first; other writers follow."""

MAX_DIGITS = 4
DIGIT_SHARE = (0.25, 0.5)
CLASS_NAMES = ("background", *map(str, range(10)))

_HELD_OUT = 0.25  # The share of a photograph's width, at the right, that only test scenes show.
_CONTRAST = (0.35, 1.0)  # Contrast of ink and background, as a share of the largest possible.
_PLACE_TRIES = 20

# The bounds for training digits, in both directions: angle and slant in radians, logarithms of
# height and width. Few people wrote the digits, so a network would memorize their handwriting.
_DISTORTION = (0.26, 0.2, 0.12, 0.12)


class Scene(NamedTuple):
    """An image with its annotations.

    image: uint8 `[side, side, 3]`.
    segmentation: uint8 `[side, side, 1]`, 0 for background and 1 + digit for ink.
    boxes: float32 `[n, 4]` as (y0, x0, y1, x1) in 0..1.
    digits: `[n]`, 0 to 9.
    areas: the number of pixels of each mask, `[n]`.
    caption: a description of the digits and their arrangement.
    """

    image: np.ndarray
    segmentation: np.ndarray
    boxes: np.ndarray
    digits: np.ndarray
    areas: np.ndarray
    caption: str


def draw_scene(
    seed: int,
    index: int,
    *,
    split: str,
    side: int,
    max_digits: int = MAX_DIGITS,
    digit_share: tuple[float, float] = DIGIT_SHARE,
) -> Scene:
    """Draws scene number `index` of a split ("train" or "test"), with 1 to `max_digits` digits.

    digit_share: the smallest and largest side of a digit's 8x8 tile, as a share of the image's.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, index]))
    canvas = _background(random, split, side)
    segmentation = np.zeros((side, side), np.uint8)
    digits, boxes, areas = [], [], []
    images, labels = _digits(split)
    taken = np.zeros((side, side), bool)
    for _ in range(random.integers(1, max_digits + 1)):
        row = random.integers(len(images))
        ink = _enlarged(images[row], int(random.integers(*np.round(side * np.array(digit_share)))))
        if split == "train":
            ink = _distorted(random, ink)
        place = _free_place(random, taken, len(ink))
        if place is None:
            continue
        covered = ink >= 0.5
        canvas[place] = _written(random, canvas[place], ink)
        segmentation[place][covered] = 1 + labels[row]
        taken[place] = True
        rows, columns = np.nonzero(covered)
        top, left = place[0].start, place[1].start
        corners = (top + rows.min(), left + columns.min(), top + rows.max(), left + columns.max())
        boxes.append(np.add(corners, (0, 0, 1, 1)) / side)
        digits.append(labels[row])
        areas.append(covered.sum())
    return Scene(
        np.round(canvas).astype(np.uint8),
        segmentation[..., None],
        np.array(boxes, np.float32),
        np.array(digits, np.int64),
        np.array(areas, np.int64),
        _caption(np.array(digits), np.array(boxes)),
    )


@functools.cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ink of the digits of a split, `[n, 8, 8]` in 0..1, and their labels, `[n]`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = slice(NUM_TRAIN_DIGITS) if split == "train" else slice(NUM_TRAIN_DIGITS, None)
    return digits.images[rows] / 16, digits.target[rows]


@functools.cache
def _photographs(split: str) -> tuple[np.ndarray, ...]:
    """Returns the part of each photograph that the scenes of a split show."""
    from sklearn.datasets import load_sample_images

    parts = []
    for photograph in load_sample_images().images:
        border = round(photograph.shape[1] * (1 - _HELD_OUT))
        parts.append(photograph[:, :border] if split == "train" else photograph[:, border:])
    return tuple(parts)


def _background(random: np.random.Generator, split: str, side: int) -> np.ndarray:
    """Returns a square crop of a photograph, float64 `[side, side, 3]`, mirrored at random."""
    photographs = _photographs(split)
    photograph = photographs[random.integers(len(photographs))]
    largest = min(photograph.shape[:2])
    crop = random.integers(min(side, largest), min(3 * side, largest) + 1)
    top, left = (random.integers(extent - crop + 1) for extent in photograph.shape[:2])
    pixels = photograph[top : top + crop, left : left + crop]
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    resized = Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)
    return np.asarray(resized, np.float64)


def _enlarged(digit: np.ndarray, side: int) -> np.ndarray:
    """Returns the ink of a digit, resized to `[side, side]`, in 0..1."""
    tile = Image.fromarray(digit.astype(np.float32))
    return np.clip(np.asarray(tile.resize((side, side), Image.Resampling.BICUBIC)), 0, 1)


def _distorted(random: np.random.Generator, ink: np.ndarray) -> np.ndarray:
    """Rotates, slants, and stretches ink about its center, within the bounds of `_DISTORTION`."""
    angle, slant, tall, wide = random.uniform(-1, 1, 4) * _DISTORTION
    cos, sin = np.cos(angle), np.sin(angle)
    # The input position of an output pixel, with x before y as in Pillow.
    matrix = np.array([[cos, sin], [-sin, cos]]) @ [[1, np.tan(slant)], [0, 1]]
    matrix = matrix / np.exp([[wide], [tall]])
    middle = (len(ink) - 1) / 2 + 0.5
    shift = middle - matrix.sum(1) * middle
    rows = np.column_stack([matrix, shift]).ravel().tolist()
    moved = Image.fromarray(ink.astype(np.float32)).transform(
        ink.shape, Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(moved), 0, 1)


def _free_place(
    random: np.random.Generator, taken: np.ndarray, side: int
) -> tuple[slice, slice] | None:
    """Returns a square of `side` pixels that contains no digit, or None if none was found."""
    for _ in range(_PLACE_TRIES):
        top, left = random.integers(0, len(taken) - side + 1, 2)
        place = slice(top, top + side), slice(left, left + side)
        if not taken[place].any():
            return place
    return None


def _written(random: np.random.Generator, paper: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Returns `paper` `[h, w, 3]` with ink of one color: light on dark paper, dark on light."""
    level = paper.mean()
    room = 255 - level if level < 127.5 else -level
    colour = level + room * random.uniform(*_CONTRAST) + random.normal(0, 12, 3)
    return paper + ink[..., None] * (np.clip(colour, 0, 255) - paper)


def _caption(digits: np.ndarray, boxes: np.ndarray) -> str:
    """Returns `a 3 above a 7`, `a 3 left of a 7`, or a list of more digits from top to bottom."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    beside = len(digits) == 2 and np.ptp(centres[:, 1]) > np.ptp(centres[:, 0])
    order = np.argsort(centres[:, 1 if beside else 0], kind="stable")
    words = [f"a {digits[i]}" for i in order]
    if len(words) <= 2:
        return (" left of " if beside else " above ").join(words)
    return f"{', '.join(words[:-1])} and {words[-1]} from top to bottom"
