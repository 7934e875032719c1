"""A figure, read off its artists and its pixels; names and values that users may give."""

import io

import matplotlib.text
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from vit_jax.report import figures


def rendered(figure):
    """The figure's pixels, `[height, width, 3]`."""
    return np.asarray(Image.open(io.BytesIO(figures.png(figure))).convert("RGB"))


def texts(figure):
    found = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    return [text for text in found if text]


def pictures(figure):
    return [image.get_array() for axes in figure.axes for image in axes.images]


def a_figure():
    return figures.confusion_matrix(np.array([[5, 1], [0, 4]]), ["cat", "dog"])


ODD_NAMES = [
    "$x^$",
    "$5_$10",
    r"\$1 \frac{",
    r"$\undefined{",
    "two\nlines",
    "\x1b[31mred\x1b[0m",
    "bell\x07 null\x00",
    "a\u202eb",
    "كلب",
    "😀",
    "\udc80",
    "\ufffe\u2028",
    "<script>&amp;",
    "x" * 3000,
    "",
    " ",
    "{0} %s {{",
]

names = st.text(max_size=60) | st.text("$\\{}^_&<>\x1b\n\u202e\udc80 a", max_size=30)
"""Any name, and often one of the characters that some program takes for markup."""

ODD_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
"""Values that a file of JSON may hold in the place of another type."""
