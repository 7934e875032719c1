"""The manifest of a checkpoint: the name, shape, dtype and checksum of every array, and metadata.

It is one JSON object, `STEP/manifest/metadata`, which carries a checksum of itself. With it, and
with the checksums of the arrays, every change of a checkpoint that could alter what is restored is
found; no file has to be read twice for that.
"""

import contextlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from vit_jax import storage
from vit_jax.checkpoints import files
from vit_jax.checkpoints.checksums import checksums
from vit_jax.errors import UserError
from vit_jax.types import Array

VERSION = 1
"""Version of the layout of a checkpoint, stored in it."""

FILE = "manifest/metadata"
_DIGESTS = "digests.json"
_KEYS = {"version", "step", "arrays", "metadata"}


class DamagedError(UserError):
    """A checkpoint has files that are missing, unreadable, cut short or changed.

    The message names what is wrong.
    """


class Saved(NamedTuple):
    """An array as the manifest describes it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    checksum: int


class Manifest(NamedTuple):
    """The description of one checkpoint.

    Attributes:
      arrays: by dotted name.
      metadata: what the caller of `Store.save` gave.
      metrics: of the evaluation of this step, if there was one.
    """

    arrays: Mapping[str, Saved]
    metadata: Any
    metrics: Mapping[str, float]


def describe(
    step: int,
    arrays: Mapping[str, Array],
    metadata: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Returns the manifest of these arrays as a JSON object."""
    sums = checksums(arrays)
    manifest = {
        "version": VERSION,
        "step": step,
        "arrays": {
            name: {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": sums[name]}
            for name, x in arrays.items()
        },
        "metadata": dict(metadata),
        "metrics": dict(metrics),
    }
    return {**manifest, "checksum": _checksum(manifest)}


def read(path: epath.Path) -> Manifest:
    """Reads the manifest of the checkpoint in the directory `path`.

    Raises:
      DamagedError: the file is missing, cannot be read, or is not what was written.
      UserError: the checkpoint was written by a newer version of this package.
    """
    file = path / FILE
    _check_files(path)
    try:
        content = storage.read_bytes(file)
        manifest = storage.parse_json(content)
        version, checksum = manifest["version"], manifest.pop("checksum", None)
        if checksum is None:
            _check_without_checksum(path, manifest, content)
        elif checksum != _checksum(manifest):
            raise DamagedError(f"{file} is not what was written, by its checksum")
        if version != VERSION:
            raise UserError(f"{path} has version {version}, this package reads up to {VERSION}")
        arrays = {
            name: Saved(tuple(map(int, x["shape"])), jnp.dtype(x["dtype"]), int(x["checksum"]))
            for name, x in manifest["arrays"].items()
        }
        return Manifest(arrays, manifest["metadata"], manifest.get("metrics", {}))
    except UserError:
        raise
    except storage.errors(ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{file}: {error!r}") from error


def _check_files(path: epath.Path) -> None:
    """Raises a `DamagedError` for pipes and devices, which could be read for ever."""
    try:
        files.check_tree(path)
    except UserError as error:
        raise DamagedError(str(error)) from error


def _checksum(manifest: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of a JSON object, whatever the order of its keys and its white space."""
    plain = json.loads(json.dumps(manifest))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def _check_without_checksum(path: epath.Path, manifest: Mapping[str, Any], content: bytes) -> None:
    """Checks a manifest of an earlier version of this package, which wrote no checksum into it.

    That version listed size and CRC-32 of every file in `digests.json` once a save was complete,
    on file systems and unless the process was killed first.
    """
    if manifest.keys() != _KEYS or manifest["version"] != VERSION:
        raise DamagedError(f"{path / FILE} is not what was written: its keys or version changed")
    with contextlib.suppress(FileNotFoundError):
        digests = storage.parse_json(storage.read_bytes(path / _DIGESTS))
        if digests[FILE] != [len(content), zlib.crc32(content)]:
            raise DamagedError(f"{path / FILE} is not what was written, by {path / _DIGESTS}")
