"""Image files: supported formats, headers, and decoding.

All readers of this package use this module. Sources pass the result of `for_decoding(...)` to the
ops that decode on the host's threads with TensorFlow; code without TensorFlow calls `pixels(...)`.
Both turn a photograph upright by its EXIF orientation, unless `exif` is "ignore".

JPEG and PNG, the formats of nearly all datasets, pass through unchanged; only their header is read.
Other formats, and PNG files with an orientation or with transparency, which is shown over white,
are decoded by Pillow and passed on as PNG. A JPEG with an orientation gets a mark near its
beginning. The ops read from it how to turn the pixels that they decode, because turning a crop
costs less than turning the image. HEIF is always upright, because its orientation is no EXIF value.
"""

import functools
import importlib.util
import io
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vit_jax.data import files
from vit_jax.data.image_headers import (
    JPEG,
    JPEG_END,
    ORIENTATION,
    PNG,
    UPRIGHT,
    BadImage,
    Header,
    format_of,
    is_transparent,
    jpeg_header,
    png_chunks,
    png_header,
)
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)


class _Optional(NamedTuple):
    """A format that Pillow reads only where a module is installed."""

    module: str
    suffixes: tuple[str, ...]
    advice: str

    @property
    def is_read(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


_OPTIONAL = {
    "HEIF": _Optional("pillow_heif", (".heic", ".heif", ".hif"), "pip install pillow-heif"),
    "AVIF": _Optional("PIL._avif", (".avif",), "pip install 'pillow>=11.3'"),
}


def _optional_suffixes(*, are_read: bool) -> list[str]:
    of_formats = (one.suffixes for one in _OPTIONAL.values() if one.is_read == are_read)
    return [suffix for suffixes in of_formats for suffix in suffixes]


SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
    *_optional_suffixes(are_read=True),
)  # fmt: skip
"""The suffixes, in lower case, of the files that a folder of images may contain."""

OTHER_SUFFIXES = (
    ".jxl", ".jp2", ".svg", ".eps", ".pdf", ".psd", ".ico", ".tga", ".dng", ".raw", ".cr2",
    ".cr3", ".nef", ".arw", *_optional_suffixes(are_read=False),
)  # fmt: skip
"""The suffixes, in lower case, of images that are not read."""

EXIF_CHOICES = ("apply", "ignore")

MAX_BYTES = 1 << 30
"""The largest image file that is read, in bytes."""

MAX_PIXELS = 178_956_970
"""The largest number of pixels of an image: Pillow's own limit. Cameras reach 150 million."""

MAX_SIDE = 65_535
"""The longest side of an image that is read, in pixels. No JPEG file has a longer side."""

# A file of a few kilobytes can decode to gigabytes of one color. No photograph, drawing, or label
# map of more than 128 MiB is compressed to less than 1/200 of its size.
_ALWAYS_UNFOLDED = 128 << 20
_MAX_RATIO = 200

MARK = b"\xff\xef\x00\x0avit_jax"
"""The mark that follows the first two bytes of a JPEG file. After the mark comes a byte with the
EXIF orientation, to which `CUT_SHORT` is added if the file lacks its proper end. Mark and byte form
an application segment (APP15), which decoders skip."""

CUT_SHORT = 16

# Other chunks of a PNG file (text, color profiles, times) do not affect its pixels.
_KEPT_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_GREY_MODES = ("1", "L", "LA", "La")
# Pillow's name of the operation that turns an image upright, by EXIF orientation.
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
    7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


def is_image_name(name: str) -> bool:
    """Returns whether a file is expected to be an image, judged by the suffix of its name."""
    return name.lower().endswith(SUFFIXES)


def how_to_read(name: str) -> str:
    """Returns what to do about an image whose suffix is one of `OTHER_SUFFIXES`."""
    for one in _OPTIONAL.values():
        if name.lower().endswith(one.suffixes):
            return f"{one.advice}, or convert it"
    return "convert it"


def images_below(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yields the image files in a folder and below, as paths relative to it, sorted by folder.

    Hidden files and folders are skipped, and so are files whose name is not that of an image. Links
    to folders are followed, except to a folder that contains the link. A warning counts the images
    of formats that are not read.

    Raises:
      UserError: a folder cannot be listed.
    """
    others: list[str] = []
    yield from _images_below(os.fspath(folder), "", frozenset(), others)
    if others:
        logger.warning(
            "%s: %d images have a format that is not read, such as %s (%s)",
            files.shown(folder), len(others), files.shown(others[0]), how_to_read(others[0]),
        )  # fmt: skip


def _images_below(root: str, inner: str, above: frozenset[str], others: list[str]) -> Iterator[str]:
    """Yields the images of a folder; appends those of formats that are not read to `others`."""
    here = os.path.realpath(os.path.join(root, inner))
    if here in above:
        return
    for entry in files.visible(os.path.join(root, inner)):
        name = os.path.join(inner, entry.name)
        if entry.is_dir():
            yield from _images_below(root, name, above | {here}, others)
        elif is_image_name(entry.name):
            yield name
        elif entry.name.lower().endswith(OTHER_SUFFIXES):
            others.append(name)


def read(path: str | os.PathLike) -> bytes:
    """Reads an image file as it is stored.

    Raises:
      OSError: the file cannot be read, is empty, is too large, or is not a regular file.
    """
    try:
        data = files.read_bytes(path, MAX_BYTES)
    except ValueError as error:  # The name contains a NUL character.
        raise BadImage(files.reason(error)) from error
    if not data:
        raise BadImage("the file is empty")
    return data


def header(data: bytes) -> Header:
    """Reads the header of an encoded image.

    Raises:
      BadImage: the bytes are not an image of a supported format, or the image has too many pixels.
    """
    found = format_of(data)
    if found == "JPEG":
        head = jpeg_header(data)
    elif found == "PNG":
        head = png_header(data)
    else:
        with _open(data, found) as image:  # This does not decode pixels yet.
            orientation = _taken_orientation(image)
            head = Header(found, (image.height, image.width), orientation)
    _check_size(head.size, data)
    return head


def for_decoding(data: bytes, exif: str = "apply", listed_size: Sequence[int] = (0, 0)) -> bytes:
    """Returns an encoded image for the ops that decode: JPEG (with a mark, if needed) or PNG.

    Args:
      exif: "apply", or "ignore" to leave the pixels as they are stored.
      listed_size: the (height, width) to which boxes or masks refer, zeros if it is unknown. An
        image that has this size only as stored is not turned, because the annotations were made on
        the image as stored.

    Raises:
      BadImage: see `header`; for formats other than JPEG and PNG also if decoding fails.
    """
    head = header(data)
    turned = exif == "apply" and is_turned(head, listed_size)
    if head.format == "JPEG":
        return _marked(data, head.orientation if turned else UPRIGHT)
    if head.format == "PNG" and not turned and not is_transparent(data):
        return data
    return _as_png(_decoded(data, head.format, head.orientation if turned else UPRIGHT))


def with_end_checked(data: bytes) -> bytes:
    """Returns encoded bytes, with a mark if they are a truncated JPEG.

    Without the mark, a crop of the remaining rows would succeed, and a crop of missing rows fail.
    """
    return _marked(data, UPRIGHT) if data.startswith(JPEG) else data


def _marked(jpeg: bytes, orientation: int) -> bytes:
    mark = orientation if jpeg.endswith(JPEG_END) else orientation + CUT_SHORT
    return jpeg if mark == UPRIGHT else jpeg[:2] + MARK + bytes([mark]) + jpeg[2:]


def is_turned(head: Header, listed_size: Sequence[int] = (0, 0)) -> bool:
    """Returns whether `for_decoding` turns an image for annotations of `listed_size`."""
    listed = tuple(listed_size)
    return head.orientation != UPRIGHT and not (head.size == listed != head.upright_size)


def pixels(data: bytes, channels: int = 3, exif: str = "apply") -> np.ndarray:
    """Decodes an encoded image with Pillow: uint8 `[height, width, channels]`.

    As in TensorFlow, the upper 8 of 16 bits are used. Transparent images lie on white.

    Args:
      channels: 3 for RGB, 1 for gray.

    Raises:
      BadImage: the image cannot be decoded.
    """
    image = decoded(data, exif)
    return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(
        image.height, image.width, channels
    )


def decoded(data: bytes, exif: str = "apply") -> "Image.Image":
    """Decodes an encoded image with Pillow, as gray (`L`) or `RGB`.

    Raises:
      BadImage: the image cannot be decoded.
    """
    head = header(data)
    return _decoded(data, head.format, head.orientation if exif == "apply" else UPRIGHT)


def read_pixels(path: str | os.PathLike, channels: int = 3, exif: str = "apply") -> np.ndarray:
    """Reads an image file with `pixels`.

    Raises:
      UserError: the file cannot be read or decoded; the message names it.
    """
    with naming(path):
        return pixels(read(path), channels, exif)


class naming:
    """A context that converts any `OSError` about an image file to a `UserError` that names it."""

    def __init__(self, path: str | os.PathLike):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, OSError):
            raise UserError(f"{files.shown(self._path)}: {files.reason(error)}") from error


def check_exif(exif: str) -> None:
    """Raises a `UserError` unless `exif` is one of `EXIF_CHOICES`."""
    if exif not in EXIF_CHOICES:
        raise UserError(f"config.data.args.exif={exif!r}: write {' or '.join(EXIF_CHOICES)}")


def _check_size(size: tuple[int, int] | None, data: bytes) -> None:
    if size is None:
        return
    count = size[0] * size[1]
    if count > MAX_PIXELS or max(size) > MAX_SIDE:
        raise BadImage(
            f"{_sides(size)} pixels are too many: up to {MAX_PIXELS:,} are read, and sides of up to"
            f" {MAX_SIDE:,}"
        )
    if 3 * count > _ALWAYS_UNFOLDED:
        # The color types 0 (gray) and 3 (palette) of PNG have one value per pixel.
        unfolded = count if data.startswith(PNG) and data[25] in (0, 3) else 3 * count
        if unfolded > max(_ALWAYS_UNFOLDED, _MAX_RATIO * len(data)):
            raise BadImage(
                f"{len(data):,} bytes that stand for {_sides(size)} pixels: no picture is "
                "compressed so well"
            )


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]:,} x {size[1]:,}"


def _open(data: bytes, found: str) -> "Image.Image":
    """Opens an image with only the Pillow parser of its format."""
    from PIL import Image

    if found == "PNG":
        data = bare_png(data)
    if found in _OPTIONAL:
        _check_is_read(found)
    try:
        return Image.open(io.BytesIO(data), formats=(found.upper(),))
    except Exception as error:  # Parsers raise errors of any type for damaged bytes.
        raise BadImage(_reason(error, found)) from error


def _check_is_read(found: str) -> None:
    """Has Pillow read an optional format. Raises `BadImage` where its module is not installed."""
    if not _OPTIONAL[found].is_read:
        raise BadImage(f"{found}, which is read after `{_OPTIONAL[found].advice}`")
    if found == "HEIF":
        _register_heif()


@functools.cache
def _register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()


def bare_png(data: bytes) -> bytes:
    """Returns a PNG file without the chunks that do not affect its pixels.

    Raises:
      BadImage: a chunk does not have its checksum, which Pillow does not compare for pixels.
    """
    kept = []
    for kind, begin, end in png_chunks(data):
        if kind in _KEPT_CHUNKS:
            if zlib.crc32(data[begin - 4 : end]) != int.from_bytes(data[end : end + 4]):
                raise BadImage(f"damaged PNG: a chunk {kind.decode()} does not have its checksum")
            kept.append(data[begin - 8 : end + 4])
    return PNG + b"".join(kept)


def _decoded(data: bytes, found: str, orientation: int) -> "Image.Image":
    """Returns the pixels of an image as gray (`L`) or `RGB`, turned upright by `orientation`."""
    from PIL import Image

    with _open(data, found) as image:
        try:
            if found == "TIFF":
                _taken_orientation(image)
            image.load()
            if image.mode.startswith("I"):
                # Keep the upper 8 of 16 bits. Pillow itself would clip all values above 255.
                bytes_ = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
                plain = Image.fromarray(bytes_)
            elif image.mode == "F":
                raise BadImage("its pixels are floating-point numbers")
            else:
                mode = "L" if image.mode in _GREY_MODES else "RGB"
                plain = (_over_white(image) if image.has_transparency_data else image).convert(mode)
            turn = _TURNS.get(orientation)
            return plain.transpose(Image.Transpose[turn]) if turn else plain
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(_reason(error, found)) from error


def _over_white(image: "Image.Image") -> "Image.Image":
    """Returns what is seen of a transparent image on a white page."""
    from PIL import Image

    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page


def _as_png(image: "Image.Image") -> bytes:
    """Encodes an image as PNG without compressing it, because it is decoded at once."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _taken_orientation(image: "Image.Image") -> int:
    """Returns the orientation of an opened image, and removes it: its pixels load as stored.

    Pillow itself would turn TIFF files upright, and tells their upright size.
    """
    from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

    try:
        found = image.getexif().pop(ORIENTATION, UPRIGHT)
        if isinstance(image, TiffImageFile):
            image._size = (int(image.tag_v2[IMAGEWIDTH]), int(image.tag_v2[IMAGELENGTH]))
    except Exception:  # Damaged EXIF data is ignored.
        return UPRIGHT
    return found if found in _TURNS else UPRIGHT


def _reason(error: Exception, found: str) -> str:
    """Returns the message of a parser's error, without the memory address of an object."""
    said = files.reason(error)
    return f"damaged {found}" if "identify image" in said else f"damaged {found}: {said}"
