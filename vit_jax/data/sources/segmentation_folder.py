"""Folders of images and of masks: `ROOT/images/SPLIT/**/NAME.jpg`, `ROOT/masks/SPLIT/**/NAME.png`.

A mask is a PNG of one byte a pixel, grey or with a palette: the class, or 255 where nothing is
labelled. Without split folders, `train[:90%]` and `train[90%:]` divide the images. Other layouts by
arguments, for example

    Cityscapes   images="leftImg8bit", masks="gtFine",
                 image_end="_leftImg8bit.png", mask_end="_gtFine_labelIds.png"
    Pascal VOC   images="JPEGImages", masks="SegmentationClass",
                 listed="ImageSets/Segmentation/{split}.txt"
"""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import parse_split, split_range
from vit_jax.errors import UserError

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_PNG = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH, _COLOUR_TYPE = 24, 25  # Where the bytes are in a PNG's header.
_GREY, _PALETTE = 0, 3


class Source:
    """`name` is ROOT; records have `image` and `segmentation`, encoded.

    images, masks: folders below ROOT. image_end, mask_end: a mask is named as its image, with one
      end in the place of the other; an empty image_end stands for the suffix.
    listed: a text file below ROOT with a name a line, `{split}` in it replaced; empty: all images.
    class_names, num_classes: of the labels; with neither, `config.task` must tell.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        images: str = "images",
        masks: str = "masks",
        image_end: str = "",
        mask_end: str = ".png",
        listed: str = "",
        class_names: Sequence[str] = (),
        num_classes: int = 0,
    ):
        root = Path(name).expanduser()
        for folder in (root, root / images, root / masks):
            if not folder.is_dir():
                raise UserError(f"no such folder: {folder}")
        part = parse_split(split)[0]
        inner = part if (root / images / part).is_dir() else ""
        if not inner and not listed and part != "train":
            raise UserError(
                f"{root / images} has no folder {part!r}: without split folders, write"
                " 'train[:90%]' and 'train[90%:]'"
            )
        self._images, self._masks = root / images, root / masks
        self._image_end, self._mask_end = image_end, mask_end
        if listed:
            stems = _listed(root / listed.format(split=part))
            names = [self._find_image(stem) for stem in stems]
        else:
            names = _image_names(root / images / inner, image_end)
            names = [os.path.join(inner, one) for one in names]
        names.sort(key=lambda one: hashlib.blake2b(os.fsencode(one), digest_size=8).digest())
        selected = split_range(split, len(names))
        self._names = names[selected.start : selected.stop]
        for number in range(len(self._names)):
            if not self._mask_path(number).is_file():
                raise UserError(f"{self.describe(number)} has no mask {self._mask_path(number)}")
        self.class_names = tuple(class_names) or None
        self.num_classes = num_classes or len(class_names)
        self.fingerprint = f"segmentation_folder:{root.name}:{split}:{len(self._names)}"

    def __len__(self) -> int:
        return len(self._names)

    def fetch(self, indices: np.ndarray) -> Records:
        images, masks = np.empty(len(indices), object), np.empty(len(indices), object)
        for row, index in enumerate(indices):
            images[row] = Path(self.describe(index)).read_bytes()
            masks[row] = _grey_png(self._mask_path(index))
        return {"image": images, "segmentation": masks}

    def describe(self, index: int) -> str:
        return str(self._images / self._names[index])

    def _mask_path(self, index: int) -> Path:
        name = self._names[index]
        stem = name.removesuffix(self._image_end) if self._image_end else os.path.splitext(name)[0]
        return self._masks / f"{stem}{self._mask_end}"

    def _find_image(self, stem: str) -> str:
        ends = (self._image_end,) if self._image_end else _IMAGE_SUFFIXES
        for end in ends:
            if (self._images / f"{stem}{end}").is_file():
                return f"{stem}{end}"
        raise UserError(f"{self._images / stem} is listed, but no such image exists")


def _image_names(folder: Path, image_end: str) -> list[str]:
    """Paths below `folder` of the images in it, at any depth."""
    ends = (image_end,) if image_end else _IMAGE_SUFFIXES
    names = [
        os.path.relpath(os.path.join(where, one), folder)
        for where, _, files in os.walk(folder)
        for one in files
        if one.lower().endswith(ends) or (image_end and one.endswith(image_end))
    ]
    names = [one for one in names if not os.path.basename(one).startswith(".")]
    if not names:
        raise UserError(f"{folder} has no images ({', '.join(ends)})")
    return names


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _grey_png(path: Path) -> bytes:
    """A mask whose bytes are the labels; of a palette, the numbers and not their colours."""
    data = path.read_bytes()
    if data[: len(_PNG)] != _PNG or len(data) <= _COLOUR_TYPE:
        raise UserError(f"{path} is no PNG file; masks are PNG, because JPEG changes the labels")
    if data[_BIT_DEPTH] == 16 or data[_COLOUR_TYPE] not in (_GREY, _PALETTE):
        raise UserError(
            f"{path} is a PNG of colours or 16 bits; a mask has one byte a pixel, the class"
        )
    if data[_COLOUR_TYPE] == _GREY and data[_BIT_DEPTH] == 8:
        return data
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as file:
            labels = np.asarray(file).astype(np.uint8)
    except (OSError, SyntaxError) as error:
        # Not a `UserError`: one truncated mask is skipped as one truncated image is.
        raise OSError(f"{path}: not a readable PNG file ({error})") from error
    if data[_COLOUR_TYPE] == _GREY and data[_BIT_DEPTH] in (2, 4):
        labels //= 255 // (2 ** data[_BIT_DEPTH] - 1)  # Pillow makes the largest of them white.
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()
