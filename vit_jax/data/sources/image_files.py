"""Image files without labels: all that lie in a folder, at any depth.

It suits methods that need no labels, and folders whose subfolders are no classes. `train[:90%]` and
`train[90%:]` divide the images, which are ordered by a hash of their paths below the folder, so a
file keeps its position relative to the others when files are added.
"""

import os

import numpy as np

from vit_jax.data import images
from vit_jax.data.files import existing_folder, path_hash, shown
from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import drawn_and_read, select_unlabeled, split_name
from vit_jax.errors import UserError


class Source:
    """Reads the images of a folder. Other files, and hidden ones, are passed over.

    Args:
      name: the folder.
      split: `train`, or a part of it in brackets.
      exif: "apply" turns photographs upright by their EXIF orientation; "ignore" does not.
    """

    num_classes = 0
    class_names = None

    def __init__(
        self, name: str, split: str = "train", *, exif: str = "apply", split_seed: int = 0
    ):
        images.check_exif(exif)
        self._root, self._exif = existing_folder(name), exif
        if split_name(split) != "train":
            raise UserError(
                f"image_files has no split {split!r}; write train, train[:90%] or train[90%:]"
            )
        names = sorted(images.images_below(str(self._root)), key=path_hash)
        if not names:
            raise UserError(f"{shown(self._root)} has no images ({', '.join(images.SUFFIXES)})")
        order = select_unlabeled(split, len(names), split_seed)
        self._names = [names[number] for number in order]
        self.fingerprint = f"image_files:{self._root.name}:{split}:{len(order)}"
        self.fingerprint += drawn_and_read(split_seed, exif)

    def __len__(self) -> int:
        return len(self._names)

    def fetch(self, indices: np.ndarray) -> Records:
        found = np.empty(len(indices), object)
        for row, index in enumerate(indices):
            data = images.read(os.path.join(self._root, self._names[index]))
            found[row] = images.for_decoding(data, self._exif)
        return {"image": found}

    def describe(self, index: int) -> str:
        return shown(os.path.join(self._root, self._names[index]))
