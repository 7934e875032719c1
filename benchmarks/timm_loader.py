"""timm's loader on a folder of image files: `timm_loader.py FOLDER PP BATCH_SIZE`, by `serving`."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving import WARM_UP, Timed, crop_and_augment, import_timm, main


class Files:
    """Image files as a PyTorch dataset, opened with Pillow as timm opens them.

    num_images: the length of the dataset, which repeats the files of the folder in their order.
    """

    def __init__(self, folder: str, num_images: int):
        self.transform = None  # timm's loader sets it.
        self._paths = sorted(Path(folder).iterdir())
        self._num_images = num_images

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path = self._paths[index % len(self._paths)]
        return self.transform(Image.open(path).convert("RGB")), 0


def prepare(folder: str, pp: str, batch_size: str) -> Timed:
    """Returns a function that times timm's loader with one worker for each core.

    The images come as timm's fast collation gives them, uint8 and not yet normalized, as ours do.

    Raises:
      UserMistake: timm is not installed, or has no counterpart of the preprocessing.
    """
    transforms_of(pp)
    import_timm()
    size, cores = int(batch_size), len(os.sched_getaffinity(0))

    def seconds_for(batches: int) -> float:
        # The loader works ahead, so as many batches must be under way at the end as at the start.
        total = WARM_UP + batches + 2 * cores
        for number, (images, _) in enumerate(loader(folder, pp, size, total, cores), 1):
            if len(images) != size:
                raise RuntimeError(f"timm gave {len(images)} images where {size} were asked for")
            if number == WARM_UP:
                started = time.perf_counter()
            if number == WARM_UP + batches:
                break
        return time.perf_counter() - started

    return seconds_for


def loader(
    folder: str, pp: str, batch_size: int, batches: int, cores: int
) -> Iterator[tuple[Any, Any]]:
    """Returns timm's loader, without its copy to a device."""
    torch = import_timm()
    from timm.data import create_loader

    torch.set_num_threads(1)
    size, augment = transforms_of(pp)
    prefetching = create_loader(
        Files(folder, batches * batch_size),
        input_size=(3, size, size),
        batch_size=batch_size,
        is_training=True,
        num_workers=cores,
        scale=(0.05, 1.0),
        ratio=(0.75, 1.33),
        hflip=0.5,
        color_jitter=0.0,
        auto_augment=augment,
        interpolation="bilinear",
        device=torch.device("cpu"),
    )
    return prefetching.loader


def transforms_of(pp: str) -> tuple[int, str | None]:
    """Returns (crop, timm's RandAugment) for the preprocessing that big_vision's recipes have.

    Raises:
      UserMistake: it is another kind of preprocessing.
    """
    size, layers, magnitude = crop_and_augment(pp, "timm")
    return size, layers and f"rand-m{magnitude}-n{layers}"


if __name__ == "__main__":
    main(prepare)
