"""Folders of images and of masks: `ROOT/images/SPLIT/**/NAME.jpg`, `ROOT/masks/SPLIT/**/NAME.png`.

A mask is a PNG file with one byte per pixel, gray or with a palette: the class, or 255 for an
unlabeled pixel. Without split folders, `train[:90%]` and `train[90%:]` divide the images. Arguments
describe other layouts, for example

    Cityscapes   images="leftImg8bit", masks="gtFine",
                 image_end="_leftImg8bit.png", mask_end="_gtFine_labelIds.png"
    Pascal VOC   images="JPEGImages", masks="SegmentationClass",
                 listed="ImageSets/Segmentation/{split}.txt"
"""

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_jax.data import files
from vit_jax.data.images import (
    MAX_BYTES,
    SUFFIXES,
    bare_png,
    check_exif,
    for_decoding,
    header,
    images_below,
    read,
)
from vit_jax.data.sources import Records
from vit_jax.data.sources._labels import read_names
from vit_jax.data.sources._splits import drawn_and_read, select_unlabeled, split_name
from vit_jax.errors import UserError

_PNG = b"\x89PNG\r\n\x1a\n"
_SIDES, _BIT_DEPTH, _COLOUR_TYPE = 16, 24, 25  # The offsets of these bytes in a PNG file.
_GREY, _PALETTE = 0, 3


class Source:
    """Reads records with `image` and `segmentation`, both encoded.

    Args:
      name: ROOT.
      split: the split, with a range or a fold of its images in brackets.
      images, masks: folders below ROOT.
      image_end, mask_end: the name of a mask is that of its image with `mask_end` in place of
        `image_end`; an empty `image_end` means the suffix.
      listed: a text file below ROOT with one image name per line; `{split}` in its path is replaced
        by the split. If empty, all images are read.
      class_names: the names of the classes in the order of their numbers, or a text file with one
        in each line.
      num_classes: their number. If neither is given, `config.task` must give it.
      exif: "apply" turns photographs upright by their EXIF orientation, unless the mask has the
        size of the image as stored; "ignore" never turns them.
      split_seed: the seed of folds.
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
        class_names: str | Sequence[str] = (),
        num_classes: int = 0,
        exif: str = "apply",
        split_seed: int = 0,
    ):
        check_exif(exif)
        self._exif = exif
        root = files.expand(name)
        for folder in (root, root / images, root / masks):
            if not folder.is_dir():
                raise UserError(f"no such folder: {files.shown(folder)}")
        part = split_name(split)
        inner = part if (root / images / part).is_dir() else ""
        if not inner and not listed and part != "train":
            raise UserError(
                f"{files.shown(root / images)} has no folder {part!r}: without split folders, write"
                " 'train[:90%]' and 'train[90%:]'"
            )
        self._images, self._masks = root / images, root / masks
        self._image_end, self._mask_end = image_end, mask_end
        if listed:
            names = self._listed_images(root / listed.replace("{split}", part))
        else:
            names = _image_names(root / images / inner, image_end)
            names = [os.path.join(inner, one) for one in names]
        self._check_unique(names)
        names.sort(key=files.path_hash)
        selected = select_unlabeled(split, len(names), split_seed)
        self._names = [names[place] for place in selected]
        for number, image in enumerate(self._names):
            if not self._mask_path(image).is_file():
                mask = files.shown(self._mask_path(image))
                raise UserError(f"{self.describe(number)} has no mask {mask}")
        class_names = read_names(class_names)
        if class_names and num_classes not in (0, len(class_names)):
            raise UserError(
                f"config.data.args.class_names has {len(class_names)} names, and num_classes is"
                f" {num_classes}; leave one out"
            )
        self.class_names = class_names or None
        self.num_classes = num_classes or len(class_names)
        self.fingerprint = f"segmentation_folder:{root.name}:{split}:{len(self._names)}"
        self.fingerprint += drawn_and_read(split_seed, exif)

    def __len__(self) -> int:
        return len(self._names)

    def fetch(self, indices: np.ndarray) -> Records:
        images, masks = np.empty(len(indices), object), np.empty(len(indices), object)
        for row, index in enumerate(indices):
            masks[row] = _grey_png(self._mask_path(self._names[index]))
            width, height = struct.unpack_from(">II", masks[row], _SIDES)
            data = read(self._images / self._names[index])
            images[row] = for_decoding(data, self._exif, (height, width))
        return {"image": images, "segmentation": masks}

    def describe(self, index: int) -> str:
        return files.shown(self._images / self._names[index])

    def _check_unique(self, names: Sequence[str]) -> None:
        """Raises a `UserError` for two images with one mask, or an image that is listed twice."""
        image_of: dict[Path, str] = {}
        for name in names:
            mask = self._mask_path(name)
            if mask in image_of:
                both = [files.shown(self._images / one) for one in (image_of[mask], name)]
                raise UserError(
                    f"{both[0]} is listed twice"
                    if both[0] == both[1]
                    else f"{both[0]} and {both[1]} have one mask, {files.shown(mask)}; remove one"
                )
            image_of[mask] = name

    def _mask_path(self, name: str) -> Path:
        stem = name.removesuffix(self._image_end) if self._image_end else os.path.splitext(name)[0]
        return self._masks / f"{stem}{self._mask_end}"

    def _listed_images(self, path: Path) -> list[str]:
        """Returns the images listed in a text file, which has one name without suffix per line."""
        found = []
        for number, line in files.numbered_lines(files.read_text(path)):
            where = f"{files.shown(path)}: line {number}"
            stem = files.path_inside(self._images, line.strip(), where)
            found.append(self._find_image(stem))
        return found

    def _find_image(self, stem: str) -> str:
        ends = (self._image_end,) if self._image_end else SUFFIXES
        for end in ends:
            if (self._images / f"{stem}{end}").is_file():
                return f"{stem}{end}"
        shown = files.shown(self._images / stem)
        raise UserError(f"{shown} is listed, but no such image exists")


def _image_names(folder: Path, image_end: str) -> list[str]:
    """Returns the paths below `folder` of the images in it, at any depth."""
    names = [one for one in images_below(folder) if one.lower().endswith(image_end.lower())]
    if not names:
        ends = image_end or ", ".join(SUFFIXES)
        raise UserError(f"{files.shown(folder)} has no images ({ends})")
    return names


def _grey_png(path: Path) -> bytes:
    """Returns a mask as a PNG file whose bytes are the labels.

    For a mask with a palette, the bytes are the numbers of the palette entries, not their colors.
    """
    data = files.read_bytes(path, MAX_BYTES)
    if data[: len(_PNG)] != _PNG or len(data) <= _COLOUR_TYPE:
        raise UserError(
            f"{files.shown(path)} is no PNG file; masks are PNG, because JPEG changes the labels"
        )
    try:
        header(data)  # Of more pixels than are read, none is decoded.
    except OSError as error:
        raise OSError(f"{files.shown(path)}: {error}") from error
    if data[_BIT_DEPTH] == 16 or data[_COLOUR_TYPE] not in (_GREY, _PALETTE):
        raise UserError(
            f"{files.shown(path)} is a PNG of colours or 16 bits; a mask has one byte a pixel, the"
            " class"
        )
    if data[_COLOUR_TYPE] == _GREY and data[_BIT_DEPTH] == 8:
        return data
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(bare_png(data))) as file:
            labels = np.asarray(file).astype(np.uint8)
    except Exception as error:  # Parsers raise errors of any type for damaged bytes.
        # This is not a `UserError`, so that a truncated mask is skipped like a truncated image.
        raise OSError(
            f"{files.shown(path)}: not a readable PNG file ({files.reason(error)})"
        ) from error
    if data[_COLOUR_TYPE] == _GREY and data[_BIT_DEPTH] in (2, 4):
        labels //= 255 // (2 ** data[_BIT_DEPTH] - 1)  # Pillow scales the largest label to 255.
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()
