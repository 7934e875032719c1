"""SimMIM: masked image modeling with one linear layer (Xie et al. 2022).

Squares of the image are masked; a ViT sees a token in the place of their patches, and one linear
layer predicts their pixels. An example needs an `image` alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.augment import device_masks
from vit_jax.errors import UserError
from vit_jax.models.heads.pixels import PixelReconstruction
from vit_jax.models.layers.basic import pair
from vit_jax.report import Section
from vit_jax.tasks._checks import build_backbone
from vit_jax.tasks._mean_error import MeanErrorTask
from vit_jax.tracking.metrics import COUNT, LOSS, Metric
from vit_jax.types import Array, Batch, DataInfo, HostBatch, Params


@dataclasses.dataclass(frozen=True)
class Task(MeanErrorTask):
    """The mean absolute error of masked pixels, which are normalized but not patch by patch.

    Attributes:
      cell: the side in pixels of the squares that are masked together.
      ratio: the share of squares that are masked, rounded up.
    """

    cell: int = 32
    ratio: float = 0.6

    headline = "masked_l1"
    metric_info: ClassVar[Mapping[str, Metric]] = {"masked_l1": LOSS, "num_examples": COUNT}

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "Task":
        """Returns the task around the backbone of `config.model`.

        Raises:
          UserError: a field has no such value, or the data has no such images.
        """
        backbone = build_backbone("simmim", model)
        task = cls(backbone, info, **fields)
        task.check_images()
        task = dataclasses.replace(task, model=PixelReconstruction(backbone))
        patch, size = pair(backbone.patch_size), info.spec["image"].shape[:2]
        cell = max(task.cell, 0)
        if patch[0] != patch[1] or not cell or cell % patch[0] or any(n % cell for n in size):
            raise UserError(
                f"config.task.cell={task.cell}: write a multiple of the patch,"
                f" {patch[0]}x{patch[1]} pixels, that divides the image, {size[0]}x{size[1]}"
            )
        if not 0 < task.ratio <= 1:
            raise UserError(f"config.task.ratio={task.ratio}: write a number above 0, to 1")
        return task

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns normalized images, and `masked`, bool `[batch, patches]`."""
        image_key, mask_key = jax.random.split(key)
        batch = super().augment({"image": batch["image"]}, image_key)
        return {"image": batch["image"], "masked": self._masks(mask_key, len(batch["image"]))}

    def hidden(self, batch: HostBatch) -> dict[str, np.ndarray]:
        """Returns the masked patches of `image`."""
        return {"image": np.asarray(batch["masked"]).reshape(-1, *self._grid())}

    def _grid(self) -> tuple[int, int]:
        patch = pair(self.model.backbone.patch_size)[0]
        height, width = (n // patch for n in self.image_spec.shape[:2])
        return height, width

    def _masks(self, key: Array, batch: int) -> Array:
        patch = pair(self.model.backbone.patch_size)[0]
        height, width = self._grid()
        masks = device_masks.cell_masks(key, batch, (height, width), self.cell // patch, self.ratio)
        return masks.reshape(batch, -1)

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the absolute errors of masked pixels, their number) of a micro-batch."""
        images = batch["image"]
        rebuilt = models.outputs_of(
            self.model, params, images, batch["masked"], train=True, rngs={"dropout": key}
        )
        masked = self._pixels(batch["masked"])
        errors = jnp.where(masked, jnp.abs(images - rebuilt), 0.0)
        return errors.sum(), masked.sum(dtype=jnp.float32) * images.shape[-1]

    def _pixels(self, masked: Array) -> Array:
        """Returns a mask of patches as one of pixels, bool `[batch, h, w, 1]`."""
        patch = pair(self.model.backbone.patch_size)[0]
        height, width = self._grid()
        masked = masked.reshape(-1, height, width, 1)
        return masked.repeat(patch, axis=1).repeat(patch, axis=2)

    # Evaluation masks the same squares of every image: its result depends on nothing else.

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns `rebuilt`, images with masked pixels predicted, and `error`, the mean of each.

        `rebuilt` is `[b, h, w, channels]` in the range of the pipeline's images.
        """
        images = self.inputs(batch)
        masks = self._masks(jax.random.key(0), 1).repeat(len(images), axis=0)
        rebuilt = models.outputs_of(self.model, params, images, masks)
        masked = self._pixels(masks)
        errors = jnp.where(masked, jnp.abs(images - rebuilt), 0.0).sum((1, 2, 3))
        pixels = masked.sum((1, 2, 3)) * images.shape[-1]
        return {"rebuilt": self.shown(jnp.where(masked, rebuilt, images)), "error": errors / pixels}

    def pictures(self, examples: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Returns each image beside its reconstruction, `[h, 2 * w, 3 or 1]`."""
        pairs = zip(examples["image"], examples["rebuilt"], strict=True)
        return [np.concatenate(both, axis=1) for both in pairs]

    def sections(self, examples: Mapping[str, np.ndarray]) -> list[Section]:
        """Returns a section with the reconstructions of the first images."""
        from vit_jax.report import figures  # matplotlib, which training can do without

        figure = figures.image_grid(self.pictures(examples), self.summaries(examples))
        text = f"Each image, and {self.ratio:.0%} of its squares as the model predicts them."
        alt = "Pairs of an image and the same image with its masked squares as predicted."
        return [Section("Reconstructions", text, figure, alt=alt)]
