"""A checkpoint that is to be read: what formats look at to recognize it, and its arrays."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from vit_jax import storage
from vit_jax.checkpoints import array_files, files, hub
from vit_jax.errors import UserError, first_line

CONFIG = "config.json"

_INDEX = ".index.json"
"""The ending of the file that lists the parts of a checkpoint, which stands for its folder."""

_PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.(safetensors|bin)$")


class Source:
    """A file or a folder, on this machine or behind an address.

    Attributes:
      path: as the user wrote it, for messages.
      place: where it lies on this machine, or its address; not the same for files of the hub.
      folder: the folder, by its absolute path; None for a file.
      tower: the part of an image-text model that is wanted: "image", "text" or "both".
    """

    def __init__(
        self,
        path: epath.PathLike,
        *,
        place: str = "",
        folder: epath.Path | None = None,
        readers: array_files.Readers | None = None,
        tower: str = "image",
    ):
        self.path = os.fspath(path)
        self.place = place or self.path
        self.folder = folder
        self.tower = tower
        self._readers = array_files.Readers() if readers is None else readers

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: epath.PathLike, tower: str = "image") -> Iterator["Source"]:
        """Opens a checkpoint for the duration of a block.

        Raises:
          UserError: there is nothing at `path`, or it is a file that holds no arrays.
        """
        place = os.fspath(hub.local_path(path))
        folder = _folder(place)
        if folder is None and place.endswith(_INDEX):
            folder = _folder(os.path.dirname(place) or os.curdir)
        if folder is not None:
            yield cls(path, place=place, folder=folder, tower=tower)
            return
        if _PART.search(place):
            raise UserError(f"{path} is one of several files of a checkpoint; give their folder")
        if not storage.is_remote(place):
            place = os.path.expanduser(place)
        with array_files.open_arrays(place) as readers:
            yield cls(path, place=place, readers=readers, tower=tower)

    @property
    def names(self) -> frozenset[str]:
        """The names of a file's arrays, which are known before any array is read."""
        return frozenset(self._readers)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts in the header of a `.safetensors` file, {} for other files and folders."""
        return self._readers.metadata

    def arrays(self) -> array_files.Arrays:
        """Returns a file's arrays; see `array_files.read_arrays`."""
        return array_files.read_all(self._readers, self.path)

    def has(self, *names: str) -> bool:
        """Returns whether this is a folder with one of these files in it."""
        return self.folder is not None and any((self.folder / name).exists() for name in names)

    @property
    def beside(self) -> epath.Path | None:
        """The folder whose files may describe the checkpoint; None for a file at an address."""
        if self.folder is not None or storage.is_remote(self.place):
            return self.folder
        return epath.Path(self.place).parent

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of a `config.json` in the folder or beside the file, {} if there is none."""
        return self.json(CONFIG)

    def json(self, name: str) -> Mapping[str, Any]:
        """Returns the content of a JSON file there, {} if there is none."""
        place = self.beside
        return {} if place is None or not (place / name).exists() else files.read_json(place / name)


def _folder(name: str) -> epath.Path | None:
    """Returns the folder that `name` stands for, or None for a file."""
    if storage.is_remote(name) and not name.startswith(files.STORES):
        return None
    try:
        place = epath.Path(name).expanduser()
        exists, is_folder = place.exists(), place.is_dir()
    except Exception as error:  # Libraries of object stores have errors of their own.
        raise UserError(f"cannot read {name}: {first_line(error)}") from error
    if not exists:
        raise UserError(f"there is no checkpoint {name}")
    if not is_folder:
        return None
    # Orbax takes no relative paths; addresses of object stores are absolute as they are.
    return place if storage.is_remote(name) else place.resolve()
