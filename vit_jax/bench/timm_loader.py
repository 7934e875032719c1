"""timm's loader on the images of a config's source, to measure ours against."""

import importlib
import io
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from vit_jax import data
from vit_jax.errors import UserError

_WARM_UP = 3
"""Batches before the clock starts: they start workers and fill buffers."""


class _Files:
    """Encoded images as a PyTorch dataset, opened with PIL as timm opens files.

    source: with encoded images. num_images: how many of them, one after the other.
    """

    def __init__(self, source: data.Source, num_images: int):
        self.transform = None  # timm's loader sets it.
        self._source = source
        self._num_images = num_images

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        record = self._source.fetch(np.array([index % len(self._source)]))
        image = Image.open(io.BytesIO(record["image"][0])).convert("RGB")
        return self.transform(image), int(record["label"][0])


def seconds_for(source: data.Source, pp: str, batch_size: int, batches: int, cores: int) -> float:
    """Seconds that timm's loader takes for `batches`, with one worker a core.

    The images come as timm's fast collation gives them, uint8 and not yet normalised, like ours.

    Raises:
      UserError: timm is not installed, or has no counterpart of the preprocessing.
    """
    # Some more at the end, so that as many are in the making there as at the start.
    in_the_making = 2 * cores
    total = _WARM_UP + batches + in_the_making
    for number, (images, _) in enumerate(_loader(source, pp, batch_size, total, cores), 1):
        if len(images) != batch_size:
            raise RuntimeError(f"timm gave {len(images)} images where {batch_size} were asked for")
        if number == _WARM_UP:
            started = time.perf_counter()
        if number == _WARM_UP + batches:
            break
    return time.perf_counter() - started


def _loader(
    source: data.Source, pp: str, batch_size: int, batches: int, cores: int
) -> Iterator[tuple[Any, Any]]:
    torch = import_torch()
    from timm.data import create_loader

    torch.set_num_threads(1)
    size, augment = transforms_of(pp)
    prefetching = create_loader(
        _Files(source, batches * batch_size),
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
    """(crop, timm's RandAugment) of preprocessing as big_vision's recipes have it.

    Raises:
      UserError: another kind of preprocessing.
    """
    match = re.fullmatch(
        r"decode_jpeg_and_inception_crop\((\d+)\)\|flip_lr(?:\|randaug\((\d+), *(\d+)\))?", pp
    )
    if not match:
        raise UserError(
            "bench --against=timm measures 'decode_jpeg_and_inception_crop(SIZE)|flip_lr' with or"
            f" without '|randaug(LAYERS,MAGNITUDE)', not config.data.pp={pp!r}"
        )
    size, layers, magnitude = match.groups()
    return int(size), layers and f"rand-m{magnitude}-n{layers}"


def import_torch() -> Any:
    """torch, with timm imported and ready.

    Raises:
      UserError: one of them is not installed.
    """
    try:
        import torch

        register = torch.library.register_fake
        # A torchvision built for CUDA cannot register its operators with a build of torch for
        # CPUs, and timm needs only its transforms.
        torch.library.register_fake = lambda *_, **__: lambda function: function
        try:
            importlib.import_module("timm.data")
        finally:
            torch.library.register_fake = register
    except ImportError as error:
        raise UserError(
            f"bench --against=timm needs timm ({error}); pip install -e '.[bench]'"
        ) from error
    return torch
