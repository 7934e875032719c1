"""The form in which a second version of a dataset stores its images: JPEG, and perhaps smaller.

Huffman codes take about half of the time of decoding a photograph, and their number follows from
the bytes of a file. FFCV's version of ImageNet (sides of at most 512 pixels, quality 90) is the
precedent (github.com/libffcv/ffcv-imagenet).
"""

import dataclasses
import io
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from vit_jax.data import images
from vit_jax.errors import UserError

_FORM = re.compile(r"q(?P<quality>\d{1,3})(?:, *max_side=(?P<side>\d{1,5}))?")
_SIDE = 224


class Form(NamedTuple):
    """The JPEG quality, and the longest side in pixels; 0 leaves the size as it is."""

    quality: int
    max_side: int = 0

    @classmethod
    def parse(cls, text: str) -> "Form":
        """Returns the form that `q90` or `q90,max_side=512` names. Raises `UserError`."""
        match = _FORM.fullmatch(text)
        found = match and cls(int(match["quality"]), int(match["side"] or 0))
        if not found or not 1 <= found.quality <= 100 or (match and match["side"] == "0"):
            raise UserError(f"{text!r} is no form of images; write q90, or q90,max_side=512")
        return found

    @property
    def suffix(self) -> str:
        """The end of the name of a dataset in this form."""
        return f"_q{self.quality}" + (f"_{self.max_side}" if self.max_side else "")

    def encode(self, data: bytes) -> bytes:
        """Returns an image in this form; a JPEG that would not get smaller stays as it is.

        The pixels are those that are stored; an EXIF orientation is not applied, and gets lost.

        Raises:
          BadImage: the image cannot be decoded.
        """
        picture = images.decoded(data, exif="ignore")
        longest = max(picture.size)
        is_reduced = 0 < self.max_side < longest
        if is_reduced:
            scale = self.max_side / longest
            size = [max(1, round(side * scale)) for side in picture.size]
            picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=self.quality)
        found = buffer.getvalue()
        is_upright_jpeg = data.startswith(images.JPEG) and images.header(data).orientation == 1
        return data if is_upright_jpeg and not is_reduced and len(data) <= len(found) else found


@dataclasses.dataclass(frozen=True)
class Difference:
    """A comparison of images with their stored form.

    images: the number of images.
    bytes_before, bytes_after: the mean size of a file.
    decode_ms_before, decode_ms_after: the mean time of decoding a file with Pillow on one thread.
    mae: the mean absolute difference of random crops, in levels of 0 to 255.
    psnr: the peak signal-to-noise ratio of all crops together, in decibels.
    """

    images: int
    bytes_before: float
    bytes_after: float
    decode_ms_before: float
    decode_ms_after: float
    mae: float
    psnr: float

    def __str__(self) -> str:
        return (
            f"of {self.images} images: {self.bytes_before / 1000:.1f} kB before,"
            f" {self.bytes_after / 1000:.1f} kB after; decoding {self.decode_ms_before:.2f} ms"
            f" before, {self.decode_ms_after:.2f} ms after; {_SIDE} px crops differ by"
            f" {self.mae:.2f} of 255 levels, PSNR {self.psnr:.1f} dB"
        )


def compare(before: Sequence[bytes], after: Sequence[bytes], seed: int = 0) -> Difference:
    """Compares images with their stored form.

    Crops are those of Inception (Szegedy et al. 2015): 5 to 100 % of the area, of ratios from 3:4
    to 4:3, brought to 224 pixels by Pillow's antialiased bilinear filter. A crop covers the same
    part of both images.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, 2]))
    squares, levels, seconds = 0.0, 0.0, np.zeros(2)
    for pair in zip(before, after, strict=True):
        box = _random_box(random, images.decoded(pair[0], exif="ignore").size)
        crops = []
        for number, data in enumerate(pair):
            started = time.perf_counter()
            picture = images.decoded(data, exif="ignore")
            seconds[number] += time.perf_counter() - started
            sides = np.tile(picture.size, 2)
            part = tuple((box * sides).tolist())
            crop = picture.convert("RGB").resize(
                (_SIDE, _SIDE), Image.Resampling.BILINEAR, box=part
            )
            crops.append(np.asarray(crop, np.float64))
        squares += ((crops[0] - crops[1]) ** 2).mean()
        levels += np.abs(crops[0] - crops[1]).mean()
    count = len(before)
    times = 1000 * seconds / count
    return Difference(
        count,
        sum(map(len, before)) / count,
        sum(map(len, after)) / count,
        float(times[0]),
        float(times[1]),
        levels / count,
        float(10 * np.log10(255**2 / max(squares / count, 1e-12))),
    )


def _random_box(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Returns (left, top, right, bottom) of a crop, as shares of the (width, height)."""
    while True:
        area = random.uniform(0.05, 1.0) * size[0] * size[1]
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        sides = np.sqrt([area * ratio, area / ratio]) / size
        if (sides <= 1).all():
            start = random.uniform(0, 1 - sides)
            return np.concatenate([start, start + sides])
