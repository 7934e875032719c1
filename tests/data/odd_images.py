"""Image files that real folders hold, and hostile ones, made small."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

ORIENTATION = 0x0112


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(width=48, height=32, seed=0):
    """A smooth picture whose four corners differ, as a Pillow image."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3)).astype(np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def turned(image, orientation, kind="JPEG", **options):
    """A file whose pixels are stored so that `orientation` makes `image` of them again."""
    inverse = {
        1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
        6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270",
    }[orientation]  # fmt: skip
    stored = image.transpose(Image.Transpose[inverse]) if inverse else image
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[ORIENTATION] = orientation
    return encoded(stored, kind, exif=exif, **options)


def png(width, height, *, content=b"", chunks=(), color=0, bits=8):
    """A PNG whose chunks, between the header and the pixels, are given."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(content, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def long_text_png():
    """Two megabytes of text, compressed to a few kilobytes, beside a small image."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    return encoded(photograph(), "PNG", pnginfo=info)


def grey_rows(width, height, value=7):
    return (b"\0" + bytes([value]) * width) * height


def large_png(side=10_000):
    """A white image of 100 megapixels, of one bit each."""
    return png(side, side, content=(b"\0" + b"\xff" * (side // 8)) * side, bits=1)


def readable():
    """name → bytes of images that are odd but right."""
    picture = photograph()
    alpha = picture.copy()
    alpha.putalpha(128)
    deep = Image.fromarray((np.arange(48 * 32).reshape(32, 48) * 40).astype(np.uint16))
    profile = (b"iCCP", b"profile\0\0" + zlib.compress(bytes(2_000_000), 9))
    return {
        "one pixel.png": png(1, 1, content=b"\0\x07"),
        "long text.png": long_text_png(),
        "long profile.png": png(2, 2, content=grey_rows(2, 2), chunks=[profile]),
        "empty sRGB.png": png(2, 2, content=grey_rows(2, 2), chunks=[(b"sRGB", b"")]),
        "sixteen bits.png": encoded(deep, "PNG"),
        "one bit.png": encoded(picture.convert("1"), "PNG"),
        "palette.png": encoded(picture.convert("P"), "PNG"),
        "alpha.png": encoded(alpha, "PNG"),
        "alpha.webp": encoded(alpha, "WEBP", lossless=True),
        "plain.webp": encoded(picture, "WEBP"),
        "plain.gif": encoded(picture, "GIF"),
        "plain.bmp": encoded(picture, "BMP"),
        "palette.bmp": encoded(picture.convert("P"), "BMP"),
        "plain.tiff": encoded(picture, "TIFF"),
        "plain.avif": encoded(picture, "AVIF"),
        "plain.ppm": encoded(picture, "PPM"),
        "grey.jpg": encoded(picture.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "progressive.jpg": encoded(picture, "JPEG", progressive=True),
        "bytes behind.jpg": encoded(picture, "JPEG") + bytes(100),
        "png inside.jpg": encoded(picture, "PNG"),
    }


def unreadable():
    """name → bytes of what is no image that is read, or would take all memory."""
    jpeg = encoded(photograph(), "JPEG")
    avif = bytearray(encoded(photograph(), "AVIF"))
    avif[40] ^= 0xFF
    avif[60] ^= 0xFF
    huge_jpeg = bytearray(jpeg)
    at = huge_jpeg.index(b"\xff\xc0")
    huge_jpeg[at + 5 : at + 9] = b"\xff\xdc\xff\xdc"
    return {
        "empty.jpg": b"",
        "text.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "html.png": b"<html>404</html>",
        "two bytes.jpg": b"\xff\xd8",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": encoded(photograph(), "PNG")[:60],
        "half.webp": encoded(photograph(), "WEBP")[:40],
        "floats.tiff": encoded(Image.new("F", (4, 4)), "TIFF"),
        "flipped.avif": bytes(avif),
        "column.png": png(1, 60_000_000, content=bytes(120_000_000)),
        "many pixels.png": png(100_000, 100_000, content=b"\0"),
        "many pixels.jpg": bytes(huge_jpeg),
        "no pixels.png": png(0, 5),
    }
