"""Tables of six images whose pixels tell their number."""

import io

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from vit_jax.data import open_source

NAMES = ("a b.png", "c,d.png", "é/山.png", "e.png", "f.png", "g.png")
LABELS = ("dog", "cat", "dog", "emu", "cat", "dog")


def png(value):
    """Returns an image of one gray as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def lines(*rows, sep=","):
    """Returns rows as the text of a table."""

    def cell(text):
        return f'"{text}"' if sep == "," and "," in text else text

    return "".join(sep.join(map(cell, row)) + "\n" for row in rows)


def write(folder, name, content):
    """Writes text, or columns as a Parquet file; returns the path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        parquet.write_table(pa.table(content), path, row_group_size=2)
    else:
        path.write_text(content, encoding="utf-8")
    return str(path)


def open_table(name, split="train", **args):
    """Opens a table as a source."""
    return open_source({"source": "table", "name": str(name), "split": split, **args})


def numbers(source):
    """Returns the number of each image of a source, told by its pixels."""
    encoded = source.fetch(np.arange(len(source)))["image"]
    return [Image.open(io.BytesIO(data)).getpixel((0, 0))[0] // 10 for data in encoded]
