"""Photographs of three classes."""

import numpy as np
from PIL import Image

CLASSES = ("left", "middle", "right")
SIZES = ((40, 64), (64, 40), (33, 57), (24, 24), (100, 31), (16, 16), (20, 50), (50, 20), (9, 30))


def write_photos(root):
    """Writes images of many sizes and formats, and returns the folder; one end tells the class."""
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for number, (height, width) in enumerate(SIZES):
            pixels = random.integers(0, 60, (height, width, 3), np.uint8)
            pixels[:, (width * label) // 3 : (width * (label + 1)) // 3] += 150
            ending = ("jpg", "png", "webp", "bmp", "JPEG", "tiff", "gif", "avif", "png")[number]
            image = Image.fromarray(pixels)
            image = image.convert("L") if number == 4 else image
            exif = Image.Exif()
            if number == 0:
                exif[0x0112] = 6  # A telephone that was held upright.
            if number == 8:
                image.putalpha(128)
            image.save(root / name / f"{number}.{ending}", exif=exif)
    return root
