"""Random images that cost nothing to make: for benchmarks, and to try a config without data.

A pool of random pixels is drawn once; a record is a window of it. So the pixels of a record depend
on its number alone, and fetching is a copy.
"""

import io
import zlib

import numpy as np

from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import parse_split, split_range

_POOL_IMAGES = 64
# (width, height) about as in ImageNet: half of its photographs are 500x375.
_PHOTO_SIZES = ((500, 375),) * 10 + ((375, 500),) * 4 + ((500, 333),) * 3 + ((640, 480), (300, 225))
_JPEG_QUALITY = 92


class Source:
    """`num_examples` images of `image_size` x `image_size` x 3, labels spread over the classes.

    With `encoded`, JPEG files of the sizes that ImageNet's have (and `image_size` has no meaning),
    so that a benchmark includes the decoding.
    """

    def __init__(
        self,
        name: str = "fake",
        split: str = "train",
        *,
        num_examples: int = 1024,
        num_classes: int = 10,
        image_size: int = 224,
        encoded: bool = False,
    ):
        selected = split_range(split, num_examples)
        seed = zlib.crc32(f"{name}/{parse_split(split)[0]}".encode())
        random = np.random.Generator(np.random.Philox(key=seed))
        self._images = _JpegPool(random) if encoded else _PixelPool(random, image_size)
        self._labels = random.integers(0, num_classes, num_examples, dtype=np.int32)
        self._selected = selected
        self.num_classes = num_classes
        self.class_names = None
        kind = "jpeg" if encoded else f"{image_size}px"
        self.fingerprint = f"fake:{name}:{split}:{len(selected)}:{kind}"

    def __len__(self) -> int:
        return len(self._selected)

    def fetch(self, indices: np.ndarray) -> Records:
        records = self._selected.start + np.asarray(indices, np.int64)
        return {"image": self._images.take(records), "label": self._labels[records]}

    def describe(self, index: int) -> str:
        return f"fake record {self._selected.start + int(index)}"


class _PixelPool:
    """Decoded images, windows of one stretch of noise."""

    def __init__(self, random: np.random.Generator, image_size: int):
        self._shape = (image_size, image_size, 3)
        self._size = int(np.prod(self._shape))
        self._pool = random.integers(0, 256, _POOL_IMAGES * self._size, dtype=np.uint8)

    def take(self, records: np.ndarray) -> np.ndarray:
        # A stride that shares no factor with the pool visits it at distinct offsets.
        offsets = (records * 7919) % (len(self._pool) - self._size + 1)
        images = np.stack([self._pool[at : at + self._size] for at in offsets.tolist()])
        return images.reshape(-1, *self._shape)


class _JpegPool:
    """Encoded images: soft shapes with grain, which compress about as photographs do."""

    def __init__(self, random: np.random.Generator):
        self._files = np.empty(_POOL_IMAGES, object)
        self._files[:] = [self._draw(random) for _ in range(_POOL_IMAGES)]

    def take(self, records: np.ndarray) -> np.ndarray:
        return self._files[records % _POOL_IMAGES]

    def _draw(self, random: np.random.Generator) -> bytes:
        from PIL import Image

        width, height = _PHOTO_SIZES[random.integers(len(_PHOTO_SIZES))]
        shapes = random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        soft = Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC)
        grain = random.normal(0, 10, (height, width, 1))
        pixels = np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY)
        return file.getvalue()
