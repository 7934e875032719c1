"""Grain's loader on a folder of image files: `grain_loader.py FOLDER PP BATCH_SIZE`, by `serving`.

Grain decodes and augments nothing itself, so crop and flip are Pillow's, in one worker process for
each core.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from serving import Timed, UserMistake, crop_alone, main, timing


class Files:
    """Image files as a source with random access."""

    def __init__(self, folder: str):
        self._paths = sorted(map(str, Path(folder).iterdir()))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> bytes:
        return Path(self._paths[index]).read_bytes()


def prepare(folder: str, pp: str, batch_size: str) -> Timed:
    """Returns a function that times Grain's loader.

    Raises:
      UserMistake: Grain is not installed, or the preprocessing is more than crop and flip.
    """
    size = crop_alone(pp, "grain", "Grain")
    return timing(loader(folder, size, int(batch_size), len(os.sched_getaffinity(0))))


def loader(folder: str, size: int, batch_size: int, workers: int) -> Any:
    """Returns Grain's loader, which repeats and shuffles the files of a folder.

    Raises:
      UserMistake: Grain is not installed.
    """
    try:
        import grain.python as grain
    except ImportError as error:
        raise UserMistake(
            f"bench --against=grain needs Grain ({error}); pip install grain"
        ) from error

    from absl import flags

    flags.FLAGS.mark_as_parsed()  # Grain's worker processes read flags of their own.

    class CropAndFlip(grain.RandomMapTransform):
        def random_map(self, element: bytes, rng: np.random.Generator) -> np.ndarray:
            return crop_and_flip(element, size, rng)

    source = Files(folder)
    sampler = grain.IndexSampler(
        len(source), shard_options=grain.NoSharding(), shuffle=True, num_epochs=None, seed=0
    )
    operations = [CropAndFlip(), grain.Batch(batch_size, drop_remainder=True)]
    return grain.DataLoader(
        data_source=source, sampler=sampler, operations=operations, worker_count=workers
    )


def crop_and_flip(data: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random crop of an image, perhaps mirrored: uint8 `[size, size, 3]`."""
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    for _ in range(10):
        area = rng.uniform(0.05, 1.0) * image.width * image.height
        ratio = np.exp(rng.uniform(np.log(0.75), np.log(1.33)))
        width, height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if width <= image.width and height <= image.height:
            break
    else:
        width = height = min(image.size)
    left = rng.integers(image.width - width + 1)
    top = rng.integers(image.height - height + 1)
    box = (left, top, left + width, top + height)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


if __name__ == "__main__":
    main(prepare)
