"""Digits with captions, for a config: `captioned:Source`. No TensorFlow, no file."""

import numpy as np
from sklearn.datasets import load_digits

from vit_jax.data.tokenizer import open_tokenizer

LENGTH = 6


class Source:
    """64 real digits to train with or the 20 after them, with `label` and tokens of "a 3"."""

    num_classes = 10
    class_names = tuple(map(str, range(10)))

    def __init__(self, split="train"):
        rows = slice(64) if split == "train" else slice(64, 84)
        digits = load_digits()
        images = np.round(digits.images[rows, ..., None] * (255 / 16)).astype(np.uint8)
        labels = digits.target[rows].astype(np.int32)
        tokens = open_tokenizer("bytes", LENGTH).encode([f"a {label}" for label in labels])
        self._records = {"image": images, "label": labels, "tokens": tokens}
        self.fingerprint = f"captioned:{split}"

    def __len__(self):
        return len(self._records["label"])

    def fetch(self, indices):
        return {name: array[indices] for name, array in self._records.items()}

    def describe(self, index):
        return f"digit {index}"
