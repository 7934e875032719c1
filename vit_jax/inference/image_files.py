"""Image files that people hand to a trained model: found in folders, read, and decoded safely."""

import io
import os
import stat
from collections.abc import Iterator

import numpy as np
from PIL import Image

from vit_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
"""The endings, in lower case, of the files that are taken from a folder."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
"""The formats that are read, whatever a file is called. Pillow would hand others to programs."""

MAX_BYTES = 1 << 30
MAX_PIXELS = 178_956_970
"""The most pixels of an image that is decoded; Pillow's own limit."""

_DECODED_BY_TENSORFLOW = ("JPEG", "PNG", "GIF", "BMP")
_LONGEST_SHOWN = 300
# What desktops leave behind, besides hidden files.
_IGNORED = ("thumbs.db", "desktop.ini", "__macosx")


def shown(name: str | os.PathLike) -> str:
    """Returns a file name for a message: on one line, printable, and shortened if it is long."""
    text = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in os.fspath(name))
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[: _LONGEST_SHOWN // 2]}…{text[-_LONGEST_SHOWN // 2 :]}"
    return text


def images_below(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields the image files in a folder and below, sorted by name within each folder.

    As in the source `folder`, hidden files and folders are passed over and linked folders are
    entered, but none twice on the same way down.

    Raises:
      UserError: a folder cannot be listed.
    """
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"cannot list {shown(folder)}: {error.strerror}") from error
    for name in names:
        if name.startswith(".") or name.lower() in _IGNORED:
            continue
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from images_below(path, above | {here})
        elif name.lower().endswith(SUFFIXES):
            yield path


def read(path: str | os.PathLike) -> bytes:
    """Reads an image file.

    Raises:
      UserError: the file cannot be read, is too large, or is no regular file.
    """
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                raise UserError(f"{shown(path)}: not a regular file of at most {MAX_BYTES:,} bytes")
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{shown(path)}: no such image file ({reason})") from error


def for_decoding(path: str | os.PathLike) -> bytes:
    """Returns an encoded image for the ops that decode; formats they do not know become PNG.

    Raises:
      UserError: the file cannot be read, or is no image of a format that is read.
    """
    data = read(path)
    with opened(data, path) as image:
        if image.format in _DECODED_BY_TENSORFLOW:
            return data
        buffer = io.BytesIO()
        _plain(image, path).save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()


def size(path: str | os.PathLike) -> tuple[int, int]:
    """Returns the (height, width) of an image file. Raises `UserError` as `for_decoding` does."""
    with opened(read(path), path) as image:
        return image.height, image.width


def pixels(path: str | os.PathLike, channels: int) -> np.ndarray:
    """Decodes an image file: uint8 `[height, width, channels]`, of 16 bits the upper 8.

    Raises:
      UserError: the file cannot be read or decoded.
    """
    with opened(read(path), path) as image:
        plain = _plain(image, path).convert("L" if channels == 1 else "RGB")
    return np.asarray(plain).reshape(plain.height, plain.width, channels)


def opened(data: bytes, path: str | os.PathLike) -> Image.Image:
    """Returns an image whose header is read and whose pixels are not decoded yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Parsers of damaged bytes raise anything.
        raise _unreadable(path, error) from error
    if image.height * image.width > MAX_PIXELS:
        raise UserError(f"{shown(path)}: {image.height} x {image.width} pixels are too many")
    return image


def _plain(image: Image.Image, path: str | os.PathLike) -> Image.Image:
    try:
        if image.mode.startswith("I"):
            # Pillow itself would make white of everything above 255.
            return Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
        return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike, error: Exception) -> UserError:
    known = f"{', '.join(FORMATS)} are read"
    reason = known if "identify image" in str(error) else " ".join(str(error).split())
    return UserError(f"{shown(path)}: not a readable image ({reason})")
