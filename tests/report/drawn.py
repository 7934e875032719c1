"""What a figure shows, read off its artists and its pixels."""

import io

import matplotlib.text
import numpy as np
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
