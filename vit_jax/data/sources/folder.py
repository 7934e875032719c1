"""A folder of image files: `ROOT/CLASS/*.jpg|jpeg|png`, or `ROOT/SPLIT/CLASS/*`.

The layout that PyTorch's ImageFolder reads, ImageNet's `train/n01440764/*.JPEG` included. Classes
are the sorted folder names of `train`, so that a class has one number everywhere; without a folder
of that name, those over all splits. Where there are no split folders, or a part of one is wanted,
`train[:90%]` and `train[90%:]` divide the images: the order of a split is that of a hash of the
files' paths, so that every part has all classes, and a file keeps its place relative to the others
when files are added.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import parse_split, split_range
from vit_jax.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png")
_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
# What desktops leave behind, besides hidden files.
_IGNORED = ("thumbs.db", "desktop.ini")


class Source:
    """`name` is ROOT, `split` the folder in it (`val` and `validation` are one), with `[a:b]`."""

    def __init__(self, name: str, split: str = "train"):
        if "://" in name:
            raise UserError(f"{name}: image folders are read from local disks; copy it to one")
        root = Path(name).expanduser()
        if not root.is_dir():
            raise UserError(f"no such folder: {root}")
        splits = split_folders(root)
        folder = _chosen_folder(root, splits, split)
        self.class_names = _class_names(root, splits)
        self.num_classes = len(self.class_names)
        self._folder = folder
        _check_class_folders(folder, self.class_names, splits)
        files = _image_files(folder, self.class_names)
        files.sort(key=lambda file: hashlib.blake2b(os.fsencode(file[0]), digest_size=8).digest())
        selected = split_range(split, len(files))
        files = files[selected.start : selected.stop]
        self._names = [file for file, _ in files]
        self._labels = np.array([label for _, label in files], np.int32)
        self.fingerprint = f"folder:{root.name}:{split}:{len(files)}"

    def __len__(self) -> int:
        return len(self._names)

    def fetch(self, indices: np.ndarray) -> Records:
        images = np.empty(len(indices), object)
        for row, index in enumerate(indices):
            with open(self.describe(index), "rb") as file:
                images[row] = file.read()
        return {"image": images, "label": self._labels[indices]}

    def describe(self, index: int) -> str:
        return os.path.join(self._folder, self._names[index])


def split_folders(root: Path) -> dict[str, Path]:
    """The split folders of `root` by the canonical name of the split; empty if it has none."""
    found = {}
    for split, names in _SPLIT_FOLDERS.items():
        for name in names:
            if (root / name).is_dir():
                found.setdefault(split, root / name)
    return found


def _chosen_folder(root: Path, splits: dict[str, Path], split: str) -> Path:
    """The folder whose subfolders are the classes of `split`."""
    wanted = parse_split(split)[0]
    canonical = next((one for one, names in _SPLIT_FOLDERS.items() if wanted in names), wanted)
    if canonical in splits:
        return splits[canonical]
    if splits:
        have = ", ".join(folder.name for folder in splits.values())
        advice = "'train[:90%]' and 'train[90%:]' divide one folder"
        raise UserError(f"{root} has no folder for the split {split!r}; it has {have} ({advice})")
    if canonical != "train":
        raise UserError(
            f"{root} has no folder for the split {split!r}: without split folders, write "
            "'train[:90%]' for training and 'train[90%:]' for validation"
        )
    return root


def _class_names(root: Path, splits: dict[str, Path]) -> tuple[str, ...]:
    """Sorted names of the class folders: a folder that only a test split has is no class."""
    folders = [splits["train"]] if "train" in splits else list(splits.values()) or [root]
    return tuple(sorted(set().union(*map(_subfolders, folders))))


def _check_class_folders(
    folder: Path, class_names: tuple[str, ...], splits: dict[str, Path]
) -> None:
    """Images outside class folders, or in those of unknown classes, have no label."""
    found = _subfolders(folder)
    if not found:
        raise UserError(
            f"{folder} has no class folders: put images into one folder a class, "
            f"as in {folder}/CLASS/photo.jpg"
        )
    unknown = sorted(found.difference(class_names))
    if unknown:
        raise UserError(
            f"{folder} has the class {', '.join(unknown)}, which {splits['train']} lacks: rename "
            "or remove it (images without known classes are for `predict`)"
        )


def _subfolders(folder: Path) -> set[str]:
    return {entry.name for entry in _visible(folder) if entry.is_dir()}


def _image_files(folder: Path, class_names: tuple[str, ...]) -> list[tuple[str, int]]:
    """(path below `folder`, label) of every image. What is no image is an error, by name."""
    files = []
    for label, name in enumerate(class_names):
        class_folder = folder / name
        if not class_folder.is_dir():  # A class of which this split has no images.
            continue
        before = len(files)
        for entry in _visible(class_folder):
            if not entry.name.lower().endswith(_SUFFIXES) or entry.is_dir():
                raise UserError(
                    f"{entry.path} is not an image file ({', '.join(_SUFFIXES)}): move it away"
                )
            files.append((f"{name}/{entry.name}", label))
        if len(files) == before:
            raise UserError(f"class folder {class_folder} has no images: fill it or remove it")
    return files


def _visible(folder: Path) -> list[os.DirEntry]:
    """The entries of a folder but hidden ones, in no particular order."""
    try:
        with os.scandir(folder) as entries:
            return [
                entry
                for entry in entries
                if not entry.name.startswith(".") and entry.name.lower() not in _IGNORED
            ]
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error
