"""Decoded images in one NumPy file: `image` uint8 [n, h, w, c] and `label` integer [n].

This is the smallest source. It does not use TensorFlow, and suits tests and data that fits in
memory. An optional string array `class_names` [num_classes] names the classes.
"""

import io
import math
import zipfile
from pathlib import Path

import numpy as np

from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import drawn_and_read, select, split_name
from vit_jax.errors import UserError, first_line

MAX_LABEL = 999_999
"""The largest label that is read. No data set has a million classes."""

ALWAYS_UNPACKED = 256 << 20
"""Bytes that may be unpacked from a file of any size."""

MAX_RATIO = 200
"""The largest ratio of larger arrays to the size of their file."""

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Source:
    """Reads the file `name`, or the file `SPLIT.npz` of the folder `name`.

    Args:
      split: the name of the split, and a part of it in brackets, see `_splits`.
      num_classes: the number of classes, if the largest label does not tell it.
      split_seed: the seed of folds and of parts of classes.
    """

    def __init__(
        self, name: str, split: str = "train", num_classes: int = 0, *, split_seed: int = 0
    ):
        path, part = Path(name), split_name(split)
        if path.is_dir():
            path = path / f"{part}.npz"
        elif part != "train":
            raise UserError(
                f"{path} is one file, all of it split 'train'; write a part of that, such as"
                f" 'train[90%:]', instead of {part!r}, or give a folder with {part}.npz"
            )
        images, labels, names = _read(path)
        self._path, self._images, self._labels = path, images, labels.astype(np.int32)
        self._numbers = select(split, self._labels, seed=split_seed)
        self.class_names = None if names is None else tuple(map(_text, names.tolist()))
        # Count over the whole file, so that a part of it has the same classes as the whole.
        found = max(int(labels.max()) + 1, len(self.class_names or ()))
        if num_classes and num_classes < found:
            raise UserError(f"{path} has {found} classes, more than num_classes={num_classes}")
        self.num_classes = num_classes or found
        self.fingerprint = f"npz:{path.name}:{split}:{len(self)}"
        self.fingerprint += drawn_and_read(split_seed)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def labels(self) -> np.ndarray:
        """The labels of all records, in their order."""
        return self._labels[self._numbers]

    def fetch(self, indices: np.ndarray) -> Records:
        numbers = self._numbers[indices]
        return {"image": self._images[numbers], "label": self._labels[numbers]}

    def describe(self, index: int) -> str:
        return f"record {self._numbers[index]} of {self._path}"


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns the checked arrays `image`, `label`, and `class_names` of a file. Never unpickles."""
    if not path.is_file():
        raise UserError(f"no such .npz file: {path}")
    if not zipfile.is_zipfile(path):  # NumPy would also load a single array (`.npy`).
        raise UserError(f"{path} is not a readable .npz file: cut short, or not from np.savez")
    try:
        check_sizes(path, path.stat().st_size)
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"image", "label"} - set(arrays)
            if missing:
                raise UserError(
                    f"{path} has no array {sorted(missing)[0]!r}; it has {', '.join(arrays)}"
                )
            images, labels = arrays["image"], arrays["label"]
            names = arrays.get("class_names")
    except UserError:
        raise
    except Exception as error:  # Parsers raise errors of any type for damaged bytes.
        raise UserError(f"{path} is not a readable .npz file: {first_line(error)}") from error
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"{path}: 'image' must be uint8 [n, h, w, c], not {images.dtype} {list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path}: 'label' must be integer [{len(images)}], "
            f"not {labels.dtype} {list(labels.shape)}"
        )
    if len(labels) == 0 or labels.min() < 0 or labels.max() > MAX_LABEL:
        raise UserError(f"{path}: needs at least one example, and labels from 0 to {MAX_LABEL:,}")
    if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
        raise UserError(
            f"{path}: 'class_names' must be texts [classes], not {names.dtype} {list(names.shape)}"
        )
    return images, labels, names


def check_sizes(file: Path | io.BytesIO, size: int) -> None:
    """Raises a `ValueError` for arrays that are far larger than the file, before they are made."""
    most = max(ALWAYS_UNPACKED, MAX_RATIO * size)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > most:
            raise ValueError("no images are compressed so well")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two arrays have one name")
        for member in members:
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                read_header = _HEADERS[version]
                shape, _, dtype = read_header(stream, max_header_size=10_000)
                if stream.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                    raise ValueError(f"{member.filename} has another size than its header tells")
