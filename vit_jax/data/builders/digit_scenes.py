"""Digit scenes, as `vit_jax.data.scenes` draws them: 6,000 to train with and 500 to test."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from vit_jax.data import scenes
from vit_jax.data.scenes import CLASS_NAMES, draw_scene

NUM_SCENES = {"train": 6000, "test": 500}
SEEDS = {"train": 0, "test": 1}


@dataclasses.dataclass
class SceneConfig(tfds.core.BuilderConfig):
    """side: of the images, in pixels."""

    side: int = 32


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """`image`, `segmentation` (11 classes), `objects` (10 classes) and `caption` of each scene."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(
        SceneConfig(name=f"{side}px", description=f"Images of {side}x{side} pixels.", side=side)
        for side in (32, 48, 64, 128, 256)
    )

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.builder_config.side
        digit = tfds.features.ClassLabel(names=CLASS_NAMES[1:])
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
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {split: self._generate_examples(split) for split in NUM_SCENES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for index in range(NUM_SCENES[split]):
            scene = draw_scene(SEEDS[split], index, split=split, side=self.builder_config.side)
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
                },
            )
