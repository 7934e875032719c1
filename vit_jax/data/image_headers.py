"""Reads the format, the size and the orientation of an image file without decoding its pixels."""

import itertools
import struct
from collections.abc import Iterator
from typing import NamedTuple

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WebP", "TIFF", "AVIF", "HEIF", "PPM")
"""The supported formats. The first bytes of a file determine its format, not its name.

HEIF (`.heic`), the format of many phones, is read where the package `pillow-heif` is installed, and
AVIF where Pillow was built with it, as the wheels from version 11.3 on are.
"""

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_MAGIC = (
    (JPEG, "JPEG"), (PNG, "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"), (b"BM", "BMP"),
    (b"II*\x00", "TIFF"), (b"MM\x00*", "TIFF"), (b"II+\x00", "TIFF"), (b"MM\x00+", "TIFF"),
)  # fmt: skip
# The first bytes of images that are not read, so that messages do not call them damaged.
_OTHER_MAGIC = (
    (b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL ", "JPEG XL"), (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"8BPS", "Photoshop"), (b"%!PS", "PostScript"), (b"%PDF", "PDF"), (b"\0\0\1\0", "icon"),
    (b"<svg", "SVG"), (b"\x1f\x8b", "gzip"), (b"PK\3\4", "ZIP"),
)  # fmt: skip
# The brands of AVIF, and of HEIF with other codecs (ISO/IEC 23008-12, annex B; MIAF).
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
JPEG_END = b"\xff\xd9"
ORIENTATION = 0x0112
UPRIGHT = 1
_SIZED = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF markers: size follows.
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # Markers without a segment.


class BadImage(OSError):
    """An image cannot be used. The message gives the reason; the caller adds the file name."""


class Header(NamedTuple):
    """Information about an image from its file's header, read without decoding pixels.

    size: (height, width) of the pixels as stored; None if the header is damaged.
    orientation: the EXIF orientation, 1 to 8; 1 is upright.
    """

    format: str
    size: tuple[int, int] | None
    orientation: int = UPRIGHT

    @property
    def upright_size(self) -> tuple[int, int] | None:
        """Returns (height, width) of the upright image; None if the size is unknown."""
        return self.size[::-1] if self.size and self.orientation > 4 else self.size


def format_of(data: bytes) -> str:
    """Returns which of `FORMATS` the first bytes identify. Raises `BadImage` if none does."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp" and any(brand in data[8:64] for brand in _AVIF_BRANDS):
        return "AVIF"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "HEIF"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "PPM"
    for magic, name in _OTHER_MAGIC:
        if data.startswith(magic):
            raise BadImage(f"{name}, a format that is not read ({', '.join(FORMATS)} are)")
    raise BadImage(f"not an image that is read ({', '.join(FORMATS)})")


def jpeg_header(data: bytes) -> Header:
    """Reads the segments of a JPEG up to the one with the size, which follows the EXIF segment."""
    at, orientation, end = 2, UPRIGHT, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _SIZED:
            if data[at + 4] != 8:
                raise BadImage(
                    f"JPEG with {data[at + 4]} bits a sample, a format that is not read (8 are):"
                    " convert it"
                )
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


def png_header(data: bytes) -> Header:
    """Reads the chunks of a PNG up to its EXIF data, which may stand behind the pixels."""
    if len(data) < 33:
        return Header("PNG", None)
    width, height = struct.unpack_from(">II", data, 16)
    orientation = UPRIGHT
    for kind, begin, _ in png_chunks(data):
        if kind == b"eXIf":
            orientation = _exif_orientation(data, begin)
        # The pixels' chunks may be many; only another chunk behind them is worth the walk.
        if kind == b"eXIf" or (kind == b"IDAT" and data.find(b"eXIf", begin) < 0):
            break
    return Header("PNG", (height, width), orientation)


def is_transparent(png: bytes) -> bool:
    """Returns whether a PNG file has an alpha channel, or transparent colors."""
    kinds = itertools.takewhile(lambda kind: kind != b"IDAT", (x[0] for x in png_chunks(png)))
    return png[25:26] in (b"\4", b"\6") or b"tRNS" in kinds


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (kind, start of the content, end of the content) of each complete chunk."""
    at = len(PNG)
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
        return UPRIGHT
    try:
        at = start + struct.unpack_from(f"{order}I", data, start + 4)[0]
        (count,) = struct.unpack_from(f"{order}H", data, at)
        for number in range(count):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, at + 2 + 12 * number)
            if tag == ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else UPRIGHT
    except struct.error:  # An offset points outside the file.
        pass
    return UPRIGHT
