"""Images and labels in the IDX files of MNIST, Fashion-MNIST, KMNIST and EMNIST, plain or gzipped.

    config.data.source = "idx"
    config.data.name = "fashion"

The folder holds `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz` and those of the test
split. The splits are `train` and `test`, which most of these datasets call `t10k`. A folder that
holds several datasets is read with the part of the names before `train`: `emnist/emnist-letters`.
"""

import contextlib
import gzip
import io
import math
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_jax.data import files
from vit_jax.data.sources import Records
from vit_jax.data.sources._labels import read_names
from vit_jax.data.sources._splits import drawn_and_read, select, split_name
from vit_jax.data.sources.npz import ALWAYS_UNPACKED, MAX_RATIO
from vit_jax.errors import UserError, nearest

MAX_BYTES = 8 << 30
"""The largest array that is read, in bytes. The largest published file of this format has 6 GB."""

_NAME = re.compile(
    r"(?P<dataset>.*?)-?(?P<split>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(?:\.gz)?"
)
_UNSIGNED_BYTES = 8
_GZIP = b"\x1f\x8b"


class Source:
    """Holds the images of a split in memory, uint8 `[n, height, width, 1]`, with their labels.

    Args:
      name: the folder of the files, or `FOLDER/DATASET`, where `DATASET` begins the files' names.
      split: `train` or `test`, and a part of it in brackets, see `_splits`.
      class_names: the names of the classes in the order of their numbers, for the files hold none,
        or a text file with one in each line.
      split_seed: the seed of folds and of parts of classes.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        class_names: str | Sequence[str] = (),
        split_seed: int = 0,
    ):
        part, class_names = split_name(split), read_names(class_names)
        images_paths, labels_paths = _find(files.expand(name), part)
        images_path, labels_path = images_paths[0], labels_paths[0]
        images, labels = _read_copies(images_paths), _read_copies(labels_paths)
        _check(images, images_path, labels, labels_path)
        # The largest label of the training split counts, because a test split may lack a class.
        training = labels
        if part != "train":
            found = None
            with contextlib.suppress(UserError):  # There may be none.
                found = _find(files.expand(name), "train")
            if found:
                training = _read_copies(found[1])
        self.num_classes = 1 + int(max(labels.max(), training.max()))
        if class_names:
            if len(class_names) < self.num_classes:
                raise UserError(
                    f"config.data.args.class_names has {len(class_names)} names, but the labels in"
                    f" {files.shown(labels_path)} go up to {self.num_classes - 1}"
                )
            self.num_classes = len(class_names)
        self.class_names = class_names or None
        self._path, self._images, self._labels = images_path, images, labels.astype(np.int32)
        self._numbers = select(split, self._labels, seed=split_seed)
        self.fingerprint = f"idx:{images_path.name}:{split}:{len(self)}"
        self.fingerprint += drawn_and_read(split_seed)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def labels(self) -> np.ndarray:
        """The labels of all records, in their order."""
        return self._labels[self._numbers]

    def fetch(self, indices: np.ndarray) -> Records:
        numbers = self._numbers[indices]
        return {"image": self._images[numbers][..., None], "label": self._labels[numbers]}

    def describe(self, index: int) -> str:
        return f"record {self._numbers[index]} of {files.shown(self._path)}"


def _find(path: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Returns the files of images and those of labels of a split, by their names.

    There are several if a file lies beside its compressed copy.

    Raises:
      UserError: there are no such files, or images and labels have the names of other datasets.
    """
    folder, dataset = (path, None) if path.is_dir() else (path.parent, path.name)
    found: dict[str, dict[tuple[str, str], list[Path]]] = {}
    for entry in files.visible(files.existing_folder(folder)):
        match = _NAME.fullmatch(entry.name)
        if match:
            here = found.setdefault(match["dataset"], {})
            here.setdefault((match["split"], match["what"]), []).append(Path(entry.path))
    where = files.shown(folder)
    if not found:
        raise UserError(
            f"{where} holds no files named like train-images-idx3-ubyte or"
            " train-labels-idx1-ubyte.gz"
        )
    if dataset is None and len(found) > 1:
        raise UserError(
            f"{where} holds {len(found)} datasets; write one of them, as in"
            f" {where}/{min(filter(None, found))}"
        )
    dataset = next(iter(found)) if dataset is None else dataset
    if dataset not in found:
        raise UserError(f"{where} holds no IDX files of {dataset!r}; {nearest(dataset, found)}")
    stored = ("t10k", "test") if split == "test" else (split,)
    pair = [
        {one: found[dataset][one, what] for one in stored if (one, what) in found[dataset]}
        for what in ("images", "labels")
    ]
    for what, by_name in zip(("images", "labels"), pair, strict=True):
        if not by_name:
            splits = sorted({one.replace("t10k", "test") for one, _ in found[dataset]})
            raise UserError(
                f"{where} has no {what} of the split {split!r}; it has files of"
                f" {' and '.join(splits)}"
            )
    images, labels = ([path for paths in one.values() for path in paths] for one in pair)
    if pair[0].keys() != pair[1].keys():
        raise UserError(
            f"{where} has {_listed(images)}, but {_listed(labels)}: are they of two datasets?"
        )
    return images, labels


def _listed(paths: Sequence[Path]) -> str:
    return " and ".join(files.shown(path.name) for path in paths)


def _read_copies(paths: Sequence[Path]) -> np.ndarray:
    """Returns the array that all files hold. Raises a `UserError` if they hold different arrays."""
    first = _read(paths[0])
    for path in paths[1:]:
        if not np.array_equal(_read(path), first):
            raise UserError(
                f"{files.shown(paths[0])} and {files.shown(path)} differ; remove one of them"
            )
    return first


def _read(path: Path) -> np.ndarray:
    """Returns the array of an IDX file, uint8.

    Nothing is allocated for a size that only the header claims, and no more of a compressed file is
    unpacked than its header announces.

    Raises:
      UserError: the file cannot be read, is damaged, or holds something other than bytes.
    """
    try:
        data = files.read_bytes(path, MAX_BYTES)
        is_packed = data.startswith(_GZIP)
        with io.BytesIO(data) as raw, gzip.open(raw) if is_packed else raw as stream:
            start = stream.read(4)
            if len(start) < 4 or start[:2] != b"\0\0" or start[3] not in (1, 3):
                raise OSError("not an IDX file of images or labels")
            if start[2] != _UNSIGNED_BYTES:
                raise OSError(f"values of type 0x{start[2]:02x}; only unsigned bytes are read")
            sizes = stream.read(4 * start[3])
            shape = struct.unpack(f">{start[3]}I", sizes)
            size = math.prod(shape)
            most = max(ALWAYS_UNPACKED, MAX_RATIO * len(data)) if is_packed else MAX_BYTES
            if size > min(most, MAX_BYTES):
                raise OSError(f"{size:,} values, more than the {most:,} that are read")
            content = stream.read(size + 1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{files.shown(path)}: {files.reason(error)}") from error
    if len(content) != size:
        has = "more" if len(content) > size else f"{len(content):,}"
        raise UserError(f"{files.shown(path)}: its header announces {size:,} values, it has {has}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _check(images: np.ndarray, images_path: Path, labels: np.ndarray, labels_path: Path) -> None:
    if images.ndim != 3 or not images.size:
        raise UserError(
            f"{files.shown(images_path)} holds an array {list(images.shape)}; images are"
            " [n, height, width]"
        )
    if labels.shape != images.shape[:1]:
        raise UserError(
            f"{files.shown(labels_path)} holds an array {list(labels.shape)} for"
            f" {len(images)} images"
        )
