"""Photographs of three classes."""

import numpy as np
from PIL import Image

CLASSES = ("left", "middle", "right")
FILES = (
    ((40, 64), "jpg"), ((64, 40), "png"), ((33, 57), "webp"), ((24, 24), "bmp"),
    ((100, 31), "JPEG"), ((16, 16), "tiff"), ((20, 50), "gif"), ((50, 20), "avif"),
    ((9, 30), "png"), ((30, 44), "jpg"), ((44, 30), "png"), ((18, 26), "png"),
)  # fmt: skip
"""The (height, width) of the images of each class, and the ending of their names."""


def write_photos(root):
    """Writes images of many sizes and formats, and returns the folder; one end tells the class."""
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for number, ((height, width), ending) in enumerate(FILES):
            pixels = random.integers(0, 60, (height, width, 3), np.uint8)
            pixels[:, (width * label) // 3 : (width * (label + 1)) // 3] += 150
            image = Image.fromarray(pixels)
            image = image.convert({4: "L", 9: "CMYK", 10: "P"}.get(number, "RGB"))
            if number == 11:  # Gray, with 16 bits a pixel.
                image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
            exif = Image.Exif()
            if number == 0:
                exif[0x0112] = 6  # A telephone that was held upright.
            if number == 8:
                image.putalpha(128)
            image.save(root / name / f"{number}.{ending}", exif=exif)
    return root
