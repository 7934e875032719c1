"""FFCV's loader on a folder of image files: `ffcv_loader.py FOLDER PP BATCH_SIZE`, by `serving`.

FFCV reads a file of its own, into which it encodes all images anew: JPEG of quality 90, sides of at
most 512 pixels, as its recipe for ImageNet does (ffcv-imagenet, write_imagenet.sh). It is therefore
compared on stored images alone. It needs OpenCV and libturbojpeg of the system to be installed.
"""

import os
from pathlib import Path
from typing import Any

from serving import Timed, UserMistake, crop_alone, main, timing


class Files:
    """Image files as FFCV's writer reads them: (image, label)."""

    def __init__(self, folder: str):
        self._paths = sorted(Path(folder).iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.open(self._paths[index]).convert("RGB"), 0


def prepare(folder: str, pp: str, batch_size: str) -> Timed:
    """Writes the files of a folder in FFCV's format; returns a function that times its loader.

    Raises:
      UserMistake: FFCV is not installed, or the preprocessing is more than crop and flip.
    """
    size = crop_alone(pp, "ffcv", "FFCV")
    return timing(loader(folder, size, int(batch_size), len(os.sched_getaffinity(0))))


def loader(folder: str, size: int, batch_size: int, workers: int) -> Any:
    """Returns FFCV's loader of the files of a folder.

    Raises:
      UserMistake: FFCV is not installed, or its epochs would have no batch.
    """
    files = Files(folder)
    if batch_size > len(files):
        raise UserMistake(
            f"bench --against=ffcv reads {len(files)} images; write config.batch_size={len(files)}"
            " or less"
        )
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip
        from ffcv.writer import DatasetWriter
    except ImportError as error:
        raise UserMistake(
            f"bench --against=ffcv needs FFCV ({error}); pip install ffcv, after OpenCV and"
            " libturbojpeg of the system"
        ) from error
    path = f"{folder.rstrip('/')}.beton"
    field = RGBImageField(write_mode="jpg", max_resolution=512, jpeg_quality=90)
    writer = DatasetWriter(path, {"image": field, "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(files)
    crop = RandomResizedCropRGBImageDecoder((size, size), scale=(0.05, 1.0), ratio=(0.75, 1.33))
    return Loader(
        path,
        batch_size=batch_size,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={"image": [crop, RandomHorizontalFlip()], "label": [IntDecoder()]},
    )


if __name__ == "__main__":
    main(prepare)
