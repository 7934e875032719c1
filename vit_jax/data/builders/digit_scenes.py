"""Digit scenes, drawn by `_scenes.py`: 60,000 for training and 500 for testing.

`digit_scenes/16px_single` is for pre-training. It has 240,000 images of one digit each, with its
`label`. The digit fills half to all of the image, so it has the size in pixels of the digits of
`digit_scenes/32px`.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from vit_jax.data.builders import _scenes as scenes
from vit_jax.data.builders._scenes import CLASS_NAMES, DIGIT_SHARE, MAX_DIGITS, draw_scene

NUM_SCENES = {"train": 60_000, "test": 500}
NUM_SINGLE_DIGITS = {"train": 240_000, "test": 500}
SEEDS = {"train": 0, "test": 1}


@dataclasses.dataclass
class SceneConfig(tfds.core.BuilderConfig):
    """A variant of the dataset: `side` of the images in pixels, and arguments of `draw_scene`."""

    side: int = 32
    max_digits: int = MAX_DIGITS
    digit_share: tuple[float, float] = DIGIT_SHARE


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """`image`, `segmentation` (11 classes), `objects` (10 classes) and `caption` of each scene.

    Scenes of the variant with single digits also have the `label` of their digit.
    """

    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES: ClassVar = {
        "1.2.0": "60,000 training scenes in place of 20,000, which models overfit.",
        "1.1.0": "20,000 training scenes in place of 6,000, their digits distorted; single digits.",
    }
    BUILDER_CONFIGS = (
        *(
            SceneConfig(name=f"{side}px", description=f"Images of {side}x{side} pixels.", side=side)
            for side in (32, 48, 64, 128, 256)
        ),
        SceneConfig(
            name="16px_single",
            description="One digit on 16x16 pixels.",
            side=16,
            version=tfds.core.Version("1.3.0"),
            release_notes={"1.3.0": "240,000 training images in place of 60,000."},
            max_digits=1,
            digit_share=(0.5, 1.0),
        ),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.side
        digit = tfds.features.ClassLabel(names=CLASS_NAMES[1:])
        label = {"label": digit} if self._is_single() else {}
        return tfds.core.DatasetInfo(
            builder=self,
            description=scenes.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
                    "segmentation": tfds.features.LabeledImage(
                        labels=list(CLASS_NAMES), shape=(side, side, 1), encoding_format="png"
                    ),
                    "objects": tfds.features.Sequence(
                        {
                            "bbox": tfds.features.BBoxFeature(),
                            "label": digit,
                            "area": np.int64,
                            "is_crowd": np.bool_,
                        }
                    ),
                    "caption": tfds.features.Text(),
                    **label,
                }
            ),
            disable_shuffling=True,
        )

    def _is_single(self) -> bool:
        return self.builder_config.max_digits == 1

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        sizes = NUM_SINGLE_DIGITS if self._is_single() else NUM_SCENES
        return {split: self._generate_examples(split, size) for split, size in sizes.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        for index in range(size):
            scene = draw_scene(
                SEEDS[split],
                index,
                split=split,
                side=config.side,
                max_digits=config.max_digits,
                digit_share=config.digit_share,
            )
            boxes = (tfds.features.BBox(*map(float, box)) for box in scene.boxes)
            objects = zip(boxes, scene.digits, scene.areas, strict=True)
            yield (
                index,
                {
                    "image": scene.image,
                    "segmentation": scene.segmentation,
                    "objects": [
                        {"bbox": box, "label": int(digit), "area": area, "is_crowd": False}
                        for box, digit, area in objects
                    ],
                    "caption": scene.caption,
                    **({"label": int(scene.digits[0])} if self._is_single() else {}),
                },
            )
