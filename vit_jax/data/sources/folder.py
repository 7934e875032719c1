"""Folders of image files: `ROOT/CLASS/*.jpg|png|...`, or `ROOT/SPLIT/CLASS/*`.

This is the layout of PyTorch's ImageFolder, including ImageNet's `train/n01440764/*.JPEG`. Classes
are the sorted folder names of `train`, so that a class has the same number in all splits. If there
is no such folder, classes are the folder names of all splits.

`train[:90%]` and `train[90%:]` divide the images, if there are no split folders or only a part of
one is needed. The images of a split are ordered by a hash of their paths, so a file keeps its
position relative to the others when files are added. The first part has images of every class if it
is large enough (`_splits.with_every_class`). `_splits` lists the other ways to divide, such as
`train[fold 1 of 5]`.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_jax.data import images
from vit_jax.data.files import existing_folder, is_hidden, path_hash, shown, visible
from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import drawn_and_read, select_with_every_class, split_name
from vit_jax.errors import UserError

_SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


class Source:
    """Reads the images of a split with their classes.

    Args:
      name: ROOT.
      split: a folder in ROOT, regardless of case, and a part of it in brackets, as in
        `train[all but fold 1 of 5]`; `val` and `validation` mean the same.
      exif: "apply" turns photographs upright by their EXIF orientation; "ignore" does not.
      group: a regular expression. Files whose paths below the split's folder have the same match
        (or first group of it) stay together in a fold, such as the images of one patient: `p\\d+`.
      split_seed: the seed of folds and of parts of classes.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        exif: str = "apply",
        group: str = "",
        split_seed: int = 0,
    ):
        images.check_exif(exif)
        if "://" in name:
            raise UserError(f"{name}: image folders are read from local disks; copy it to one")
        root = existing_folder(name)
        splits = split_folders(root)
        folder = _chosen_folder(root, splits, split)
        classes = _classes(root, splits)
        self.class_names = tuple(_decodable(name) for name in classes.values())
        self.num_classes = len(classes)
        self._folder, self._exif = folder, exif
        here = _class_folders(folder, classes, splits)
        files = _image_files(folder, here)
        files.sort(key=lambda file: path_hash(file[0]))
        labels = np.array([label for _, label in files], np.int32)
        groups = _groups(group, [name for name, _ in files])
        order = select_with_every_class(split, labels, groups, split_seed)
        self._names = [files[number][0] for number in order]
        self._labels = labels[order]
        self.fingerprint = f"folder:{root.name}:{split}:{len(order)}"
        self.fingerprint += drawn_and_read(split_seed, exif)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def labels(self) -> np.ndarray:
        """The labels of all records, in their order."""
        return self._labels

    def fetch(self, indices: np.ndarray) -> Records:
        found = np.empty(len(indices), object)
        for row, index in enumerate(indices):
            data = images.read(os.path.join(self._folder, self._names[index]))
            found[row] = images.for_decoding(data, self._exif)
        return {"image": found, "label": self._labels[indices]}

    def describe(self, index: int) -> str:
        return shown(os.path.join(self._folder, self._names[index]))


def split_folders(root: Path) -> dict[str, Path]:
    """Returns the split folders of `root` by the canonical name of the split; {} if it has none.

    Split folders contain class folders. If `train` and other folders contain images directly,
    `train` is a class.
    """
    if not os.path.isdir(root):
        return {}
    folders = [entry.name for entry in visible(root) if entry.is_dir()]
    found = {}
    for split, names in _SPLIT_FOLDERS.items():
        # Prefer lower case if a folder exists in several spellings.
        of_split = [one for one in sorted(folders, reverse=True) if one.lower() in names]
        of_split.sort(key=lambda one: names.index(one.lower()))
        if of_split:
            found[split] = root / of_split[0]
    are_all = all(any(one.lower() in names for names in _SPLIT_FOLDERS.values()) for one in folders)
    return found if are_all or any(map(_has_folders, found.values())) else {}


def _has_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not is_hidden(entry.name) for entry in entries)


def _chosen_folder(root: Path, splits: Mapping[str, Path], split: str) -> Path:
    """Returns the folder whose subfolders are the classes of `split`."""
    wanted = split_name(split).lower()
    canonical = next((one for one, names in _SPLIT_FOLDERS.items() if wanted in names), wanted)
    if canonical in splits:
        return splits[canonical]
    if splits:
        have = ", ".join(folder.name for folder in splits.values())
        advice = "'train[:90%]' and 'train[90%:]' divide one folder"
        raise UserError(
            f"{shown(root)} has no folder for the split {split!r}; it has {have} ({advice})"
        )
    if canonical != "train":
        raise UserError(
            f"{shown(root)} has no folder for the split {split!r}: without split folders, write "
            "'train[:90%]' for training and 'train[90%:]' for validation"
        )
    return root


def _classes(root: Path, splits: Mapping[str, Path]) -> dict[str, str]:
    """Returns the names of the class folders by their normal form, in the order of their numbers.

    A folder that only a test split has is not a class. The normal form is that of Unicode: an é is
    one character or two, depending on the system on which a folder was created.
    """
    folders = [splits["train"]] if "train" in splits else list(splits.values()) or [root]
    found: dict[str, str] = {}
    for folder in folders:
        found = _subfolders(folder) | found
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _subfolders(folder: Path) -> dict[str, str]:
    """Returns the names of the folders in `folder`, by their normal form."""
    found: dict[str, str] = {}
    for entry in visible(folder):
        form = unicodedata.normalize("NFC", entry.name)
        if entry.is_dir() and found.setdefault(form, entry.name) != entry.name:
            raise UserError(
                f"{shown(folder)} has two folders {shown(form)!r}, whose names look alike but are"
                " written with other characters (Unicode's NFC and NFD): make one of them"
            )
    return found


def _class_folders(
    folder: Path, classes: Mapping[str, str], splits: Mapping[str, Path]
) -> list[tuple[str, int]]:
    """Returns (name of its folder in `folder`, number) for each class that has one.

    Images outside class folders, or in folders of unknown classes, would have no label.
    """
    found = _subfolders(folder)
    if not found:
        raise UserError(
            f"{shown(folder)} has no class folders: put images into one folder a class, "
            f"as in {shown(folder)}/CLASS/photo.jpg"
        )
    unknown = sorted(found.keys() - classes.keys())
    if unknown:
        named = ", ".join(map(shown, unknown))
        raise UserError(
            f"{shown(folder)} has the class {named}, which {shown(splits['train'])} lacks: rename "
            "or remove it (images without known classes are for `predict`)"
        )
    return [(found[form], label) for label, form in enumerate(classes) if form in found]


def _image_files(folder: Path, classes: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Returns (path below `folder`, label) of every image. Any other file is an error."""
    files: list[tuple[str, int]] = []
    for name, label in classes:
        before = len(files)
        for entry in visible(folder / name):
            if not images.is_image_name(entry.name) or entry.is_dir():
                known = ", ".join(images.SUFFIXES)
                if entry.name.lower().endswith(images.OTHER_SUFFIXES):
                    raise UserError(
                        f"{shown(entry.path)} has a format that is not read ({known} are):"
                        f" {images.how_to_read(entry.name)}"
                    )
                raise UserError(f"{shown(entry.path)} is not an image file ({known}): move it away")
            files.append((f"{name}/{entry.name}", label))
        if len(files) == before:
            raise UserError(
                f"class folder {shown(folder / name)} has no images: fill it or remove it"
            )
    return files


def _groups(pattern: str, paths: Sequence[str]) -> np.ndarray | None:
    """Returns the number of the group of each file, int64 `[n]`; None without a pattern."""
    if not pattern:
        return None
    try:
        matches = [re.search(pattern, path) for path in paths]
    except re.error as error:
        raise UserError(
            f"config.data.args.group={pattern!r} is no regular expression: {error}"
        ) from error
    names = []
    for path, match in zip(paths, matches, strict=True):
        if not match or (match.re.groups and match[1] is None):
            raise UserError(f"config.data.args.group={pattern!r} does not match {shown(path)}")
        names.append(match[1] if match.re.groups else match[0])
    return np.unique(names, return_inverse=True)[1]


def _decodable(name: str) -> str:
    """Returns a file name as printable text: bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode(errors="replace")
