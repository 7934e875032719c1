"""Random images at almost no cost, for benchmarks and for trying a config without data.

A pool of random pixels, or of encoded photographs, is drawn once; each record is a part of it. The
pixels of a record therefore depend only on its number, and fetching a record is a copy.
"""

import functools
import importlib.util
import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import parse_split, split_range
from vit_jax.data.stored import Form
from vit_jax.errors import UserError

_POOL_IMAGES = 64
# (width, height), distributed about as in ImageNet, where half of the photographs are 500x375.
_PHOTO_SIZES = ((500, 375),) * 10 + ((375, 500),) * 4 + ((500, 333),) * 3 + ((640, 480), (300, 225))
# ImageNet's files are 115 kB on average (147.9 GB for 1,281,167).
_JPEG_QUALITY = 98
_MIN_ZOOM = 0.8  # The smallest crop, relative to its final size: a smaller crop would be blurred.


class Source:
    """Generates `num_examples` images `[image_size, image_size, 3]`, with labels of all classes.

    With `encoded`, images are JPEG files with the sizes of ImageNet's files, in pixels and in
    bytes, so that a benchmark includes the decoding; `image_size` is then ignored. With `stored`,
    such as `q90,max_side=512`, they are in the form of `prepare --store`.
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
        stored: str = "",
    ):
        form = Form.parse(stored) if stored else None
        if form and not encoded:
            raise UserError("config.data.args.stored: write encoded=true, too")
        selected = split_range(split, num_examples)
        seed = zlib.crc32(f"{name}/{parse_split(split)[0]}".encode())
        random = np.random.Generator(np.random.Philox(key=seed))
        self._images = _JpegPool(random, form) if encoded else _PixelPool(random, image_size)
        self._labels = random.integers(0, num_classes, num_examples, dtype=np.int32)
        self._selected = selected
        self.num_classes = num_classes
        self.class_names = None
        kind = f"jpeg{form.suffix if form else ''}" if encoded else f"{image_size}px"
        self.fingerprint = f"fake:{name}:{split}:{len(selected)}:{kind}"

    def __len__(self) -> int:
        return len(self._selected)

    def fetch(self, indices: np.ndarray) -> Records:
        records = self._selected.start + np.asarray(indices, np.int64)
        return {"image": self._images.take(records), "label": self._labels[records]}

    def describe(self, index: int) -> str:
        return f"fake record {self._selected.start + int(index)}"


class _PixelPool:
    """A pool of decoded images: each is a window of one long array of noise."""

    def __init__(self, random: np.random.Generator, image_size: int):
        self._shape = (image_size, image_size, 3)
        self._size = int(np.prod(self._shape))
        self._pool = random.integers(0, 256, _POOL_IMAGES * self._size, dtype=np.uint8)

    def take(self, records: np.ndarray) -> np.ndarray:
        # A stride without a common factor with the pool's length gives distinct offsets.
        offsets = (records * 7919) % (len(self._pool) - self._size + 1)
        images = np.stack([self._pool[at : at + self._size] for at in offsets.tolist()])
        return images.reshape(-1, *self._shape)


class _JpegPool:
    """A pool of encoded photographs. Records of other names and splits get other photographs."""

    def __init__(self, random: np.random.Generator, form: Form | None):
        self._order = random.permutation(_POOL_IMAGES)
        self._form = form

    def take(self, records: np.ndarray) -> np.ndarray:
        return _encoded_photographs(self._form)[self._order[records % _POOL_IMAGES]]


@functools.cache
def _encoded_photographs(form: Form | None = None) -> np.ndarray:
    """Returns windows, some mirrored, of the two photographs of scikit-learn: bytes `[n]`.

    The pixels are real because the time of decoding depends on how well an image compresses.
    """
    if form:
        return np.array([form.encode(data) for data in _encoded_photographs()], object)
    random = np.random.Generator(np.random.Philox(key=0))
    photographs = [Image.open(path).convert("RGB") for path in _photographs()]
    files = np.empty(_POOL_IMAGES, object)
    files[:] = [_window_of(random, photographs) for _ in range(_POOL_IMAGES)]
    return files


def _photographs() -> list[Path]:
    """Returns the paths of `china.jpg` and `flower.jpg`.

    It does not import scikit-learn, which would take a second.
    """
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    return [package / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]


def _window_of(random: np.random.Generator, photographs: list[Image.Image]) -> bytes:
    """Returns a JPEG of one of the sizes of ImageNet's photographs."""
    width, height = _PHOTO_SIZES[random.integers(len(_PHOTO_SIZES))]
    photograph = photographs[random.integers(len(photographs))]
    largest = min(photograph.width / width, photograph.height / height)
    zoom = random.uniform(min(_MIN_ZOOM, largest), largest)
    left = random.uniform(0, photograph.width - zoom * width)
    top = random.uniform(0, photograph.height - zoom * height)
    window = (left, top, left + zoom * width, top + zoom * height)
    image = photograph.resize((width, height), Image.Resampling.LANCZOS, box=window)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
