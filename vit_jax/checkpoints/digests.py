"""Digests of a checkpoint's files, by which a changed one is found and named.

Not on object stores: they keep digests of their own, and would have to be read back.
"""

import json
import zlib
from pathlib import Path

from etils import epath

from vit_jax.errors import UserError
from vit_jax.storage import write_atomically

FILE = "digests.json"


class DamagedError(UserError):
    """A checkpoint whose files are missing, cut short or changed. Names what is wrong."""


def write(path: epath.Path) -> None:
    """Records size and CRC-32 of every file of a checkpoint."""
    if "://" in str(path):
        return
    digests = {name: _digest(path / name) for name in _file_names(path)}
    write_atomically(path / FILE, json.dumps(digests).encode())


def verify(path: epath.Path) -> None:
    """Raises `DamagedError` for a file that is missing or not what was saved.

    A process that was killed right after a save has left no digests; the arrays' own checksums
    remain.
    """
    if not (path / FILE).exists():
        return
    try:
        digests = json.loads((path / FILE).read_text())
        for name, expected in digests.items():
            if not (path / name).exists():
                raise DamagedError(f"{path / name} is missing, which {path / FILE} names")
            if _digest(path / name) != expected:
                raise DamagedError(f"{path / name} is not what was saved, by {path / FILE}")
    except (ValueError, AttributeError) as error:
        raise DamagedError(f"{path / FILE}: {error}") from error


def _file_names(path: epath.Path) -> list[str]:
    files = (file for file in Path(path).rglob("*") if file.is_file())
    return sorted(str(file.relative_to(path)) for file in files)


def _digest(file: epath.Path) -> list[int]:
    """[size in bytes, CRC-32], read in pieces."""
    crc, size = 0, 0
    with file.open("rb") as opened:
        while piece := opened.read(1 << 22):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return [size, crc]
