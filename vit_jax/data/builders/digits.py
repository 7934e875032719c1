"""Handwritten digits that come with scikit-learn: 1,797 real 8x8 images, no network needed.

They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak, 1998), by
43 writers, in the order in which they were collected. The splits keep this order, so the writers of
the test split do not appear in training.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vit_jax.data.builders._scenes import NUM_TRAIN_DIGITS as NUM_TRAIN


class Digits(tfds.core.GeneratorBasedBuilder):
    """`image` (8, 8, 1) uint8, `label` 0 to 9, `id` the row in scikit-learn's arrays."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES: ClassVar = {
        "2.0.0": "Plain pixels: PNG cost more time to decode than a digit to learn."
    }
    CLASSES = range(10)
    """The digits that the dataset contains; their labels count from 0."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=map(str, self.CLASSES)),
                    "id": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            # Unshuffled records keep the writers apart, even in parts such as train[1150:].
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Pixels are counts of ink from 0 to 16.
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        return {
            "train": self._generate_examples(images, digits.target, range(NUM_TRAIN)),
            "test": self._generate_examples(images, digits.target, range(NUM_TRAIN, len(images))),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, rows: range
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows:
            if labels[row] in self.CLASSES:
                label = self.CLASSES.index(labels[row])
                yield row, {"image": images[row], "label": label, "id": str(row)}
