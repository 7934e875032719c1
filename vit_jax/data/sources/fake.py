"""Random images that cost nothing to make: for benchmarks, and to try a config without data.

A pool of random pixels is drawn once; a record is a window of it. So the pixels of a record depend
on its number alone, and fetching is a copy.
"""

import zlib

import numpy as np

from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import parse_split, split_range

_POOL_IMAGES = 64


class Source:
    """`num_examples` images of `image_size` x `image_size` x 3, labels spread over the classes."""

    def __init__(
        self,
        name: str = "fake",
        split: str = "train",
        num_examples: int = 1024,
        num_classes: int = 10,
        image_size: int = 224,
    ):
        selected = split_range(split, num_examples)
        seed = zlib.crc32(f"{name}/{parse_split(split)[0]}".encode())
        random = np.random.Generator(np.random.Philox(key=seed))
        self._shape = (image_size, image_size, 3)
        self._pool = random.integers(
            0, 256, _POOL_IMAGES * int(np.prod(self._shape)), dtype=np.uint8
        )
        self._labels = random.integers(0, num_classes, num_examples, dtype=np.int32)
        self._selected = selected
        self.num_classes = num_classes
        self.class_names = None
        self.fingerprint = f"fake:{name}:{split}:{len(selected)}x{image_size}"

    def __len__(self) -> int:
        return len(self._selected)

    def fetch(self, indices: np.ndarray) -> Records:
        records = self._selected.start + np.asarray(indices, np.int64)
        size = int(np.prod(self._shape))
        # An odd stride visits the pool at distinct offsets, so that records differ.
        offsets = (records * 7919) % (len(self._pool) - size + 1)
        images = np.stack([self._pool[at : at + size] for at in offsets.tolist()])
        return {"image": images.reshape(-1, *self._shape), "label": self._labels[records]}

    def describe(self, index: int) -> str:
        return f"fake record {self._selected.start + int(index)}"
