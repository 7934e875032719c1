"""Image files on their way to a trained model, prepared as the model's weights expect.

`AsEvaluated` runs the evaluation preprocessing of a run; `ByInputSpec` follows what a checkpoint of
another codebase tells of its images.
"""

import glob
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vit_jax import data
from vit_jax.checkpoints.input_spec import InputSpec
from vit_jax.data import files, images, sampling, unlabeled
from vit_jax.data.files import shown
from vit_jax.data.placement import Placement
from vit_jax.data.sources import SOURCES
from vit_jax.errors import UserError, quoted
from vit_jax.plugins import is_foreign
from vit_jax.storage import is_remote

Picture = str | os.PathLike | np.ndarray
"""An image file, or uint8 pixels `[height, width, 1 or 3]`."""

BATCH_SIZE = 64


def as_pictures(given: Any, what: str = "images") -> Sequence[Picture]:
    """Returns images that a user gave, one file or a collection of files and pixels, as a sequence.

    Arrays of other libraries become arrays of NumPy.

    Args:
      what: the name of the argument, for messages.

    Raises:
      UserError: they are none.
    """
    if isinstance(given, str | os.PathLike):
        return [given]
    is_list = isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0
    if not is_list or isinstance(given, Mapping | bytes | Image.Image):
        raise UserError(f"{what}={quoted(given)}: write a list of image files or of uint8 pixels")
    return [_as_picture(one, f"{what}[{number}]") for number, one in enumerate(given)]


def _as_picture(given: Any, where: str) -> Picture:
    if isinstance(given, str | np.ndarray) or (
        isinstance(given, os.PathLike) and isinstance(os.fspath(given), str)
    ):
        return given
    if isinstance(given, Image.Image):
        raise UserError(f"{where} is an image of Pillow: give its file, or np.asarray(image)")
    if hasattr(given, "__array__"):
        return np.asarray(given)
    raise UserError(f"{where}={quoted(given)}: write an image file or uint8 pixels")


_WILDCARDS = frozenset("*?[")


def find_images(paths: Iterable[str]) -> list[str]:
    """Returns the image files that paths name: files, folders with all below them, and patterns.

    `@FILE` stands for the files that a text file names, one on each line. What a folder holds is
    found as the source `folder` finds it: hidden files are passed over, linked folders are entered.
    The images of a folder or pattern are sorted by name.

    Raises:
      UserError: a path names no image.
    """
    found: list[str] = []
    for path in paths:
        expanded = os.path.expanduser(path)
        if os.path.isdir(expanded):
            found += _images_in(expanded)
        elif path.startswith("@") and not os.path.lexists(path):
            found += _listed_in(path[1:])
        elif os.path.lexists(expanded) or is_remote(path):
            found.append(expanded)
        elif not _WILDCARDS & set(path):
            raise UserError(f"{shown(path)}: No such file or directory")
        else:
            matches = sorted(glob.glob(expanded, recursive=True))
            if not matches:
                raise UserError(f"{shown(path)}: no file matches this pattern")
            for match in matches:
                found += _images_in(match) if os.path.isdir(match) else [match]
    return found


def _listed_in(path: str) -> list[str]:
    lines = files.numbered_lines(files.read_text(files.expand(path)))
    found = [os.path.expanduser(line.strip()) for _, line in lines]
    if not found:
        raise UserError(f"{shown(path)}: write the name of an image file on each line")
    return found


def _images_in(folder: str) -> list[str]:
    found = [os.path.join(folder, name) for name in images.images_below(folder)]
    if not found:
        endings = ", ".join(images.SUFFIXES)
        raise UserError(f"{shown(folder)}: no image files ({endings}) in it or below")
    return found


class Pictures:
    """Image files, or pixels, as a source of records without labels (`vit_jax.data.Source`).

    fit: (height, width, channels) to which every image is decoded and brought; None hands encoded
      images on, as the sources of image files do.
    exif: "apply" turns files upright as their EXIF orientation says, before anything else; "ignore"
      does not.
    """

    num_classes = 0
    class_names: tuple[str, ...] | None = None
    fingerprint = "the image files"

    def __init__(
        self,
        pictures: Sequence[Picture],
        fit: tuple[int, int, int] | None = None,
        exif: str = "apply",
    ):
        self._pictures = pictures
        self._fit = fit
        self._exif = exif

    def __len__(self) -> int:
        return len(self._pictures)

    def describe(self, index: int) -> str:
        picture = self._pictures[index]
        return f"image {index}" if isinstance(picture, np.ndarray) else shown(picture)

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if self._fit:
            height, width, channels = self._fit
            spec = InputSpec(size=(height, width))
            fitted = [fit(self.pixels(index, channels), spec) for index in indices]
            return {"image": np.stack(fitted)}
        encoded = np.empty(len(indices), object)
        for row, index in enumerate(indices):
            encoded[row] = self._encoded(index)
        return {"image": encoded}

    def pixels(self, index: int, channels: int = 3) -> np.ndarray:
        """Returns a decoded image: uint8 `[height, width, channels]`.

        Raises:
          UserError: the file is missing, or no image that is read.
        """
        picture = self._pictures[index]
        if not isinstance(picture, np.ndarray):
            return images.read_pixels(picture, channels, self._exif)
        image = _as_image(picture).convert("L" if channels == 1 else "RGB")
        return np.asarray(image).reshape(image.height, image.width, channels)

    def size(self, index: int) -> tuple[int, int]:
        """Returns the (height, width) of an image. Raises `UserError` as `pixels` does."""
        picture = self._pictures[index]
        if isinstance(picture, np.ndarray):
            return picture.shape[:2]
        with images.naming(picture):
            encoded = images.read(picture)
            head = images.header(encoded)
            size = head.upright_size if self._exif == "apply" else head.size
            return size or images.pixels(encoded, exif=self._exif).shape[:2]

    def _encoded(self, index: int) -> bytes:
        picture = self._pictures[index]
        if isinstance(picture, np.ndarray):
            buffer = io.BytesIO()
            _as_image(picture).save(buffer, "PNG", compress_level=0)
            return buffer.getvalue()
        with images.naming(picture):
            return images.for_decoding(images.read(picture), self._exif)


def _as_image(pixels: np.ndarray) -> Image.Image:
    has_form = pixels.ndim == 3 and pixels.shape[-1] in (1, 3) and pixels.size > 0
    if pixels.dtype != np.uint8 or not has_form:
        raise UserError(
            f"an image of {pixels.dtype} {list(pixels.shape)}: give uint8 [height, width, 1 or 3]"
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


class Preparation(Protocol):
    """The preparation of images for one model."""

    def pictures(self, pictures: Sequence[Picture]) -> Pictures:
        """Returns the images as a source."""
        ...

    def batches(self, pictures: Pictures, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields batches as the task takes them, all of one size, with `mask` 0 for padding."""
        ...

    def placement(self, pictures: Pictures, index: int) -> Placement | None:
        """Returns where a prepared image lies in its file; None where that cannot be told."""
        ...

    def describe(self) -> str:
        """Returns in words how a file becomes the pixels that the model is given."""
        ...

    def settings(self) -> tuple[Any, ...]:
        """Returns everything that the prepared pixels depend on besides the file."""
        ...


class AsEvaluated:
    """The evaluation preprocessing of a run, on image files.

    pp: the preprocessing string. shape: (height, width, channels) of the run's images, to which
      files are brought where the string takes images of one size alone. exif: see `Pictures`.
    """

    def __init__(self, pp: str, shape: tuple[int, int, int], exif: str = "apply"):
        self._part = unlabeled.image_part(pp, shape[-1])
        self._fit = None if self._part.is_sized else shape
        self._exif = exif

    @classmethod
    def by(cls, config: ConfigDict, shape: tuple[int, int, int]) -> "AsEvaluated":
        """Returns the preprocessing of a run's first evaluation set, on images of a shape."""
        pp = _first_eval_set(config).get("pp", config.data.eval_pp)
        return cls(pp, shape, exif_of(config))

    def pictures(self, pictures: Sequence[Picture]) -> Pictures:
        return Pictures(pictures, self._fit, self._exif)

    def describe(self) -> str:
        """Returns in words how a file becomes the pixels that the model is given."""
        fitted = f"brought to {self._fit[0]} x {self._fit[1]} pixels, then " if self._fit else ""
        return f"{fitted}preprocessed as the run's evaluation: `{self._part.text or 'nothing'}`"

    def settings(self) -> tuple[Any, ...]:
        return self._part.text, self._fit, self._exif

    def batches(self, pictures: Pictures, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        with data.eval_batches(
            pictures, batch_size=batch_size, rows=np.arange(batch_size), pp=self._part.text
        ) as batches:
            yield from batches

    def placement(self, pictures: Pictures, index: int) -> Placement | None:
        size = pictures.size(index)
        seed = sampling.augment_seeds(0, np.array([index]))[0]
        if not self._fit:
            return unlabeled.placement(self._part, size, seed)
        fitted = fit_placement(size, InputSpec(size=self._fit[:2]))
        if not self._part.text:
            return fitted
        then = unlabeled.placement(self._part, self._fit[:2], seed)
        return then and then.after(fitted)


def exif_of(config: ConfigDict) -> str:
    """Returns whether a run's first evaluation set obeys EXIF orientations: apply or ignore.

    A source without an argument for it may tell by its attribute `exif`.
    """
    given = _first_eval_set(config)
    told = given.get("args", config.data.args).get("exif")
    source = given.get("source", config.data.source)
    if told or is_foreign(source):  # Code from outside this package need not be at hand here.
        return told or "apply"
    return getattr(SOURCES.find(source, "config.data.source"), "exif", "apply")


def _first_eval_set(config: ConfigDict) -> dict[str, Any]:
    return dict(next(iter(config.eval.sets.values()), {}))


class ByInputSpec:
    """The preparation that a checkpoint of another codebase expects; `exif` as in `Pictures`."""

    def __init__(self, spec: InputSpec, channels: int, exif: str = "apply"):
        self._spec = spec
        self._channels = channels
        self._exif = exif

    def pictures(self, pictures: Sequence[Picture]) -> Pictures:
        return Pictures(pictures, exif=self._exif)

    def describe(self) -> str:
        """Returns in words how a file becomes the pixels that the model is given."""
        fit = "shorter side" if self._spec.keeps_aspect else "both sides"
        size = " x ".join(map(str, _sides(self._spec)))
        return (
            f"{fit} resized ({self._spec.interpolation}, Pillow) to the size over"
            f" {self._spec.crop:.3g}, then the middle {size} pixels cut out"
        )

    def settings(self) -> tuple[Any, ...]:
        return self._spec, self._channels, self._exif

    def batches(self, pictures: Pictures, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(pictures), batch_size):
            numbers = range(start, min(start + batch_size, len(pictures)))
            rows = [fit(pictures.pixels(i, self._channels), self._spec) for i in numbers]
            mask = np.arange(batch_size) < len(rows)
            rows += [np.zeros_like(rows[0])] * (batch_size - len(rows))
            yield {"image": np.stack(rows), "mask": mask.astype(np.float32)}

    def placement(self, pictures: Pictures, index: int) -> Placement | None:
        return fit_placement(pictures.size(index), self._spec)


def fit(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Returns uint8 pixels `[h, w, c]` resized and cut to `spec.size`, as Pillow does it."""
    (height, width), (top, left) = _steps(pixels.shape[:2], spec)
    if height * width > images.MAX_PIXELS:
        old = " x ".join(map(str, pixels.shape[:2]))
        raise UserError(f"an image of {old} pixels cannot be resized to {height} x {width}")
    image = _as_image(pixels)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[spec.interpolation.upper()])
    high, wide = _sides(spec)
    image = image.crop((left, top, left + wide, top + high))
    return np.asarray(image).reshape(high, wide, pixels.shape[-1])


def fit_placement(size: tuple[int, int], spec: InputSpec) -> Placement:
    """Returns where the image that `fit` makes of one of this (height, width) lies in it."""
    resized, (top, left) = _steps(size, spec)
    scale = (size[0] / resized[0], size[1] / resized[1])
    return Placement(scale, (scale[0] * top, scale[1] * left), size)


def _sides(spec: InputSpec) -> tuple[int, int]:
    assert spec.size is not None
    return spec.size


def _steps(size: tuple[int, int], spec: InputSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the (height, width) to resize to, and the (top, left) of what is cut out."""
    # Sizes that are meant to be whole may be off by a rounding error of the division.
    wanted = [math.floor(side / spec.crop + 1e-6) for side in _sides(spec)]
    if spec.keeps_aspect:
        scale = max(side / old for side, old in zip(wanted, size, strict=True))
        resized = [
            max(side, int(old * scale + 1e-6)) for side, old in zip(wanted, size, strict=True)
        ]
    else:
        resized = wanted
    margins = [old - side for old, side in zip(resized, _sides(spec), strict=True)]
    halves = [round(x / 2) if spec.rounds_to_even else x // 2 for x in margins]
    return (resized[0], resized[1]), (halves[0], halves[1])
