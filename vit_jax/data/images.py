"""Image files: supported formats, headers, and decoding.

All readers of this package use this module. Sources pass the result of `for_decoding(...)` to the
ops that decode on the host's threads with TensorFlow; code without TensorFlow calls `pixels(...)`.
Both turn a photograph upright by its EXIF orientation, unless `exif` is "ignore".

JPEG and PNG, the formats of nearly all datasets, pass through unchanged; only their header is read.
Other formats, and PNG files with an orientation or with transparency, which is shown over white,
are decoded by Pillow and passed on as PNG. A JPEG
with an orientation gets a mark near its beginning. The ops read from it how to turn the pixels that
they decode, because turning a crop costs less than turning the image.
"""

import io
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vit_jax.data import files
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".avif", ".ppm",
    ".pgm",
)  # fmt: skip
"""The suffixes, in lower case, of the files that a folder of images may contain."""

OTHER_SUFFIXES = (
    ".heic", ".heif", ".jxl", ".jp2", ".svg", ".eps", ".pdf", ".psd", ".ico", ".tga", ".dng",
    ".raw", ".cr2", ".cr3", ".nef", ".arw",
)  # fmt: skip
"""The suffixes, in lower case, of images that are not read."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WebP", "TIFF", "AVIF", "PPM")
"""The supported formats. The first bytes of a file determine its format, not its name."""

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

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_MAGIC = (
    (_JPEG, "JPEG"), (_PNG, "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"), (b"BM", "BMP"),
    (b"II*\x00", "TIFF"), (b"MM\x00*", "TIFF"), (b"II+\x00", "TIFF"), (b"MM\x00+", "TIFF"),
)  # fmt: skip
_JPEG_END = b"\xff\xd9"
_ORIENTATION = 0x0112
_UPRIGHT = 1
_SIZED = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF markers: size follows.
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # Markers without a segment.
# Other chunks of a PNG file (text, color profiles, times) do not affect its pixels.
_KEPT_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_GREY_MODES = ("1", "L", "LA", "La")
# Pillow's name of the operation that turns an image upright, by EXIF orientation.
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
    7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


class BadImage(OSError):
    """An image cannot be used. The message gives the reason; the caller adds the file name."""


class Header(NamedTuple):
    """Information about an image from its file's header, read without decoding pixels.

    size: (height, width) of the pixels as stored; None if the header is damaged.
    orientation: the EXIF orientation, 1 to 8; 1 is upright.
    """

    format: str
    size: tuple[int, int] | None
    orientation: int = _UPRIGHT

    @property
    def upright_size(self) -> tuple[int, int] | None:
        """Returns (height, width) of the upright image; None if the size is unknown."""
        return self.size[::-1] if self.size and self.orientation > 4 else self.size


def is_image_name(name: str) -> bool:
    """Returns whether a file is expected to be an image, judged by the suffix of its name."""
    return name.lower().endswith(SUFFIXES)


def images_below(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yields the image files in a folder and below, as paths relative to it, sorted by folder.

    Hidden files and folders are skipped, and so are files whose name is not that of an image. Links
    to folders are followed, except to a folder that contains the link.

    Raises:
      UserError: a folder cannot be listed.
    """
    yield from _images_below(os.fspath(folder), "", frozenset())


def _images_below(root: str, inner: str, above: frozenset[str]) -> Iterator[str]:
    here = os.path.realpath(os.path.join(root, inner))
    if here in above:
        return
    for entry in files.visible(os.path.join(root, inner)):
        name = os.path.join(inner, entry.name)
        if entry.is_dir():
            yield from _images_below(root, name, above | {here})
        elif is_image_name(entry.name):
            yield name


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
    found = _format(data)
    if found == "JPEG":
        head = _jpeg_header(data)
    elif found == "PNG":
        head = _png_header(data)
    else:
        with _open(data, found) as image:  # This does not decode pixels yet.
            head = Header(found, (image.height, image.width), _pillow_orientation(image))
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
        return _marked(data, head.orientation if turned else _UPRIGHT)
    if head.format == "PNG" and not turned and not _is_transparent(data):
        return data
    return _as_png(_decoded(data, head.format, head.orientation if turned else _UPRIGHT))


def with_end_checked(data: bytes) -> bytes:
    """Returns encoded bytes, with a mark if they are a truncated JPEG.

    Without the mark, a crop of the remaining rows would succeed, and a crop of missing rows fail.
    """
    return _marked(data, _UPRIGHT) if data.startswith(_JPEG) else data


def _marked(jpeg: bytes, orientation: int) -> bytes:
    mark = orientation if jpeg.endswith(_JPEG_END) else orientation + CUT_SHORT
    return jpeg if mark == _UPRIGHT else jpeg[:2] + MARK + bytes([mark]) + jpeg[2:]


def is_turned(head: Header, listed_size: Sequence[int] = (0, 0)) -> bool:
    """Returns whether `for_decoding` turns an image for annotations of `listed_size`."""
    listed = tuple(listed_size)
    return head.orientation != _UPRIGHT and not (head.size == listed != head.upright_size)


def pixels(data: bytes, channels: int = 3, exif: str = "apply") -> np.ndarray:
    """Decodes an encoded image with Pillow: uint8 `[height, width, channels]`.

    As in TensorFlow, the upper 8 of 16 bits are used. Transparent images lie on white.

    Args:
      channels: 3 for RGB, 1 for gray.

    Raises:
      BadImage: the image cannot be decoded.
    """
    head = header(data)
    image = _decoded(data, head.format, head.orientation if exif == "apply" else _UPRIGHT)
    return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(
        image.height, image.width, channels
    )


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


def _format(data: bytes) -> str:
    """Returns which of `FORMATS` the first bytes identify. Raises `BadImage` if none does."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp" and (b"avif" in data[8:64] or b"avis" in data[8:64]):
        return "AVIF"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "PPM"
    raise BadImage(f"not an image that is read ({', '.join(FORMATS)})")


def _jpeg_header(data: bytes) -> Header:
    """Reads the segments of a JPEG up to the one with the size, which follows the EXIF segment."""
    at, orientation, end = 2, _UPRIGHT, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _SIZED:
            size = (data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8])
            return Header("JPEG", size, orientation)
        if marker == 0xFF:  # Any number of these bytes may precede a marker.
            at += 1
        elif marker in _ALONE:
            at += 2
        else:
            if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
                orientation = _exif_orientation(data, at + 10)
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return Header("JPEG", None)


def _png_header(data: bytes) -> Header:
    if len(data) < 33:
        return Header("PNG", None)
    width, height = struct.unpack_from(">II", data, 16)
    orientation = _UPRIGHT
    for kind, begin, _ in _png_chunks(data):
        if kind == b"eXIf":
            orientation = _exif_orientation(data, begin)
        if kind in (b"eXIf", b"IDAT"):
            break
    return Header("PNG", (height, width), orientation)


def _is_transparent(png: bytes) -> bool:
    """Returns whether a PNG file has an alpha channel, or transparent colors."""
    kinds = itertools.takewhile(lambda kind: kind != b"IDAT", (x[0] for x in _png_chunks(png)))
    return png[25:26] in (b"\4", b"\6") or b"tRNS" in kinds


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (kind, start of the content, end of the content) of each complete chunk."""
    at = len(_PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            return
        yield kind, at + 8, end
        at = end + 4


def _exif_orientation(data: bytes, start: int) -> int:
    """Returns the orientation in the EXIF block at `start`; 1 if there is none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[start : start + 4])
    if order is None:
        return _UPRIGHT
    try:
        at = start + struct.unpack_from(f"{order}I", data, start + 4)[0]
        (count,) = struct.unpack_from(f"{order}H", data, at)
        for number in range(count):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, at + 2 + 12 * number)
            if tag == _ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else _UPRIGHT
    except struct.error:  # An offset points outside the file.
        pass
    return _UPRIGHT


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
        unfolded = count if data.startswith(_PNG) and data[25] in (0, 3) else 3 * count
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
        data = _bare_png(data)
    try:
        return Image.open(io.BytesIO(data), formats=(found.upper(),))
    except Exception as error:  # Parsers raise errors of any type for damaged bytes.
        raise BadImage(_reason(error, found)) from error


def _bare_png(data: bytes) -> bytes:
    """Returns a PNG file without the chunks that do not affect its pixels."""
    kept = [data[b - 8 : e + 4] for kind, b, e in _png_chunks(data) if kind in _KEPT_CHUNKS]
    return _PNG + b"".join(kept)


def _decoded(data: bytes, found: str, orientation: int) -> "Image.Image":
    """Returns the pixels of an image as gray (`L`) or `RGB`, turned upright by `orientation`."""
    from PIL import Image

    with _open(data, found) as image:
        try:
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


def _pillow_orientation(image: "Image.Image") -> int:
    """Returns the orientation of an opened image; 1 for TIFF, which Pillow itself turns upright."""
    if image.format == "TIFF":
        return _UPRIGHT
    try:
        found = image.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:  # Damaged EXIF data is ignored.
        return _UPRIGHT
    return found if found in _TURNS else _UPRIGHT


def _reason(error: Exception, found: str) -> str:
    """Returns the message of a parser's error, without the memory address of an object."""
    said = files.reason(error)
    return f"damaged {found}" if "identify image" in said else f"damaged {found}: {said}"
