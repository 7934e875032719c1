"""The answers of a model for a batch of images, and the pictures that they are drawn on."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data.placement import Placement
from vit_jax.inference.preparation import Pictures, Preparation

_SIDE = 512
"""The longer side in pixels that photographs are reduced to before they are drawn."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers for a batch of images.

    Attributes:
      pictures: the images as they were given.
      prepared: the images as the model was given them, `image` `[n, height, width, channels]`,
        with the other arrays that preprocessing made.
      outputs: the task's answers, one entry for each image. Boxes and masks are those of the
        upright image in the file, whatever preprocessing made of it.
      placements: where each prepared image lies in its file. None, if the task's answers have
        places and preprocessing cannot be undone: the answers are those of the prepared image.
    """

    pictures: Pictures
    prepared: Mapping[str, np.ndarray]
    outputs: Mapping[str, Any]
    placements: Sequence[Placement | None]

    def names(self) -> list[str]:
        """Returns the name of each image, without the folders that it lies in."""
        return [os.path.basename(self.pictures.describe(n)) for n in range(len(self.pictures))]

    def images(self) -> Sequence[np.ndarray] | np.ndarray:
        """Returns the pictures that the outputs are about, uint8 or float `[h, w, channels]`.

        They are one array where all of them are prepared images.
        """
        if not any(self.placements):
            return self.prepared["image"]
        return [
            image if place is None else self._pixels(number)
            for number, (image, place) in enumerate(
                zip(self.prepared["image"], self.placements, strict=True)
            )
        ]

    def photographs(self) -> list[np.ndarray]:
        """Returns the upright images as they were given, reduced if large, uint8 `[h, w, c]`."""
        return [_reduced(self._pixels(number)) for number in range(len(self.pictures))]

    def views(self, preparation: Preparation) -> list[np.ndarray]:
        """Returns the part of each image that the model was given, uint8 or float `[h, w, c]`.

        It has the resolution of the image as it was given, but is reduced if large. Where
        preprocessing cannot be undone, and where it enlarges, it is the prepared image.
        """
        found = []
        for number, prepared in enumerate(self.prepared["image"]):
            place = preparation.placement(self.pictures, number)
            area = place and _area(place, prepared.shape[:2])
            found.append(_reduced(self._pixels(number)[area]) if area else prepared)
        return found

    def _pixels(self, number: int) -> np.ndarray:
        return self.pictures.pixels(number, self.prepared["image"].shape[-1])


def _area(place: Placement, size: tuple[int, int]) -> tuple[slice, slice] | None:
    """Returns the part of a file that was reduced to a prepared image of this (height, width).

    It is None for an image that was enlarged, turned over or padded.
    """
    start = np.array(place.origin)
    end = start + np.array(place.scale) * size
    is_inside = (start > -1).all() and (end < np.add(place.size, 1)).all()
    if min(place.scale) < 1 or not is_inside:
        return None
    (top, left), (bottom, right) = (
        np.maximum(0, each.round().astype(int)) for each in (start, end)
    )
    return slice(top, bottom), slice(left, right)


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """Returns uint8 pixels `[h, w, c]` whose longer side is at most `_SIDE`."""
    if max(pixels.shape[:2]) <= _SIDE:
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, pixels.shape[-1])
