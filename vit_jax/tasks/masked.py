"""Masked autoencoding: predicts the pixels of most patches from the others (He et al. 2022, MAE).

An example has an `image`; labels are not read. It may have `noise`, float `[patches]`, whose
smallest numbers then choose the patches that are kept.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models.heads.masked_autoencoder import MaskedAutoencoder, MaskedOutputs, PatchDecoder
from vit_jax.models.layers.basic import cut_patches, pair
from vit_jax.models.layers.encoder import Encoder
from vit_jax.models.layers.positions import sincos_table
from vit_jax.plugins import check_fields, check_known
from vit_jax.report import Section
from vit_jax.tasks._checks import build_backbone
from vit_jax.tasks._mean_error import MeanErrorTask
from vit_jax.tracking.metrics import COUNT, LOSS, Metric
from vit_jax.types import Array, Batch, DataInfo, HostBatch, Params

DECODER = {"width": 512, "depth": 8, "num_heads": 16}
"""The decoder of the paper, for every size of encoder."""

FIXED = r"(?:backbone|decoder)/pos_embed"
"""The tables of positions, which are not trained."""

_EPSILON = 1e-6
_INHERITED = (
    *("norm", "norm_epsilon", "activation", "scan", "unroll", "remat", "attention"),
    *("dtype", "residual_dtype", "initialization"),
)


@dataclasses.dataclass(frozen=True)
class Task(MeanErrorTask):
    """Prediction of the pixels of masked patches, by the mean squared error.

    The encoder sees only the patches that are kept. A learned table of positions in `config.model`
    is set to the fixed sines and cosines of the paper and never trained; fine-tuning loads it like
    any other table.

    Attributes:
      mask_ratio: the share of the patches that are removed.
      norm_pixels: the targets of each patch have mean 0 and variance 1.
      decoder: fields of the decoder that replace those of `DECODER`. The kind of norm, activation,
        computation and initialization are those of `config.model` unless they are given here.
    """

    mask_ratio: float = 0.75
    norm_pixels: bool = True
    decoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    headline = "loss"
    metric_info: ClassVar[Mapping[str, Metric]] = {"loss": LOSS, "num_examples": COUNT}

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "Task":
        """Returns the task around the encoder that `config.model` describes.

        Raises:
          UserError: a field has no such value, the model is no ViT, or the data has no images.
        """
        backbone = build_backbone("masked", model)
        if backbone.num_registers or backbone.distill_token:
            raise UserError(
                "config.task.name='masked' pre-trains a ViT alone; config.model must have no"
                " registers or distill_token"
            )
        task = cls(backbone, info, **fields)
        if not 0 < task.mask_ratio < 1:
            raise UserError(f"config.task.mask_ratio={task.mask_ratio}: write a number from 0 to 1")
        task.check_images()
        if backbone.position == "learned" or backbone.position_table:
            _check_width("model", backbone.width)
        channels = info.spec["image"].shape[-1]
        height, width = pair(backbone.patch_size)
        if height * width * channels == 1 and task.norm_pixels:
            raise UserError(
                "config.task.norm_pixels: a patch of one number has no variance; write false"
            )
        whole = MaskedAutoencoder(backbone, task._decoder(height * width * channels))
        task = dataclasses.replace(task, model=whole)
        if not 0 < task._num_kept() < task._num_patches():
            raise UserError(
                f"config.task.mask_ratio={task.mask_ratio} keeps {task._num_kept()} of"
                f" {task._num_patches()} patches; some must be kept and some removed"
            )
        return task

    def _decoder(self, num_outputs: int) -> nn.Module:
        known = {field.name for field in dataclasses.fields(Encoder)} - {"parent", "name"}
        for key in self.decoder:
            check_known(key, known, f"config.task.decoder.{key}")
        check_fields(Encoder, self.decoder, "config.task.decoder.")
        inherited = {name: getattr(self.model, name) for name in _INHERITED}
        fields = {**inherited, **DECODER, **self.decoder}
        _check_width("task.decoder", fields["width"])
        return PatchDecoder(num_outputs=num_outputs, **fields)

    @property
    def _grid(self) -> tuple[int, int]:
        height, width, _ = self.image_spec.shape
        patch = pair(models.backbone_of(self.model).patch_size)
        return height // patch[0], width // patch[1]

    def _num_patches(self) -> int:
        return self._grid[0] * self._grid[1]

    def _num_kept(self) -> int:
        return int(self._num_patches() * (1 - self.mask_ratio))

    def init(self, key: Array) -> Params:
        """Returns fresh parameters in boxes, with the fixed table of the encoder's positions."""
        params = super().init(key)
        backbone = dict(params["backbone"])
        if "pos_embed" in backbone:
            box = backbone["pos_embed"]
            _, rows, width = box.value.shape
            # A model may keep its table for another grid than that of the images.
            grid = models.traits_of(self.model).table_grid or self._grid
            table = sincos_table(*grid, width, class_row=rows > math.prod(grid))
            backbone["pos_embed"] = box.replace_boxed(jnp.asarray(table))
        return {**params, "backbone": backbone}

    def frozen(self, params: Params, patterns: Sequence[str]) -> list[str]:
        """Returns `patterns`, and the tables of positions, which are never trained."""
        del params
        return [*patterns, FIXED]

    def train_flops(self) -> int:
        """Returns the operations of a training step for one example, with few patches encoded."""
        params = jax.eval_shape(lambda: nn.meta.unbox(self.init(jax.random.key(0))))
        image = jax.ShapeDtypeStruct((1, *self.image_spec.shape), jnp.float32)
        kept, restore = jax.eval_shape(lambda: self._split(jnp.zeros((1, self._num_patches()))))

        def forward(params: Params, images: Array, kept: Array, restore: Array) -> Array:
            found, _ = models.outputs_of(
                self.model, params, images, kept=kept, restore=restore, mutable=["intermediates"]
            )
            return found.pixels

        return 3 * models.product_flops(jax.make_jaxpr(forward)(params, image, kept, restore).jaxpr)

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns normalized images and which patches of them are kept, see `_split`.

        The noise of an image depends on the key and the number of its row in the global batch, so
        on (seed, position) alone.
        """
        augmented = super().augment(batch, key)
        noise = batch.get("noise")
        if noise is None:
            shape = len(augmented["image"]), self._num_patches()
            noise = jax.random.uniform(jax.random.fold_in(key, 1), shape)
        kept, restore = self._split(noise)
        return {"image": augmented["image"], "kept": kept, "restore": restore}

    def hidden(self, batch: HostBatch) -> dict[str, np.ndarray]:
        """Returns the removed patches of `image`."""
        removed = np.asarray(batch["restore"]) >= self._num_kept()
        return {"image": removed.reshape(-1, *self._grid)}

    def targets(self, batch: Batch) -> dict[str, Array]:
        """Returns {}: the targets are the images' own pixels."""
        del batch
        return {}

    def _split(self, noise: Array) -> tuple[Array, Array]:
        """Returns the patches that are kept and the place of each patch among all, both int32.

        Patches are ordered by their noise `[b, patches]`; the first ones are kept, in this order.
        """
        order = jnp.argsort(noise, axis=1).astype(jnp.int32)
        restore = jnp.argsort(order, axis=1).astype(jnp.int32)
        return order[:, : self._num_kept()], restore

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the errors of the removed patches, their number) of a micro-batch."""
        inputs = (batch["image"], batch["kept"], batch["restore"])
        outputs = self._apply(params, *inputs, train=True, rngs={"dropout": key})
        errors = self._errors(outputs.pixels, batch["image"])
        removed = batch["restore"] >= self._num_kept()
        return jnp.where(removed, errors, 0).sum(), removed.sum(dtype=jnp.float32)

    def _apply(
        self, params: Params, images: Array, kept: Array, restore: Array, **options: Any
    ) -> MaskedOutputs:
        return models.outputs_of(self.model, params, images, kept=kept, restore=restore, **options)

    def _errors(self, pixels: Array, images: Array) -> Array:
        """Returns the mean squared error of each patch, float32 `[b, patches]`."""
        target, mean, deviation = self._patches(images)
        if self.norm_pixels:
            target = (target - mean) / deviation
        return jnp.square(pixels - target).mean(-1)

    def _patches(self, images: Array) -> tuple[Array, Array, Array]:
        """Returns the pixels of patches `[b, patches, n]`, and the mean and deviation of each."""
        patch = pair(self.model.backbone.patch_size)
        target = cut_patches(images.astype(jnp.float32), patch)
        target = target.reshape(len(images), self._num_patches(), -1)
        mean = target.mean(-1, keepdims=True)
        variance = target.var(-1, keepdims=True, ddof=1)
        return target, mean, jnp.sqrt(variance + _EPSILON)

    # Evaluation removes the same patches of every image: its result depends on nothing else.

    def _evaluated(self, params: Params, batch: Batch) -> tuple[Array, MaskedOutputs, Array]:
        """Returns the images, the outputs, and which patches were removed, bool `[b, patches]`."""
        images = self.inputs(batch)
        noise = jax.random.uniform(jax.random.key(0), (1, self._num_patches()))
        kept, restore = self._split(jnp.tile(noise, (len(images), 1)))
        outputs = self._apply(params, images, kept, restore)
        return images, outputs, restore >= self._num_kept()

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns images with removed patches: `masked` in gray, `reconstructed` as predicted.

        Both are `[b, h, w, channels]` in the range of the pipeline's images. Predictions of
        normalized pixels get the true mean and deviation of their patch, as in the figures of the
        paper's code. `error` `[b]` is the mean error of the removed patches.
        """
        images, outputs, removed = self._evaluated(params, batch)
        target, mean, deviation = self._patches(images)
        predicted = outputs.pixels * deviation + mean if self.norm_pixels else outputs.pixels
        errors = jnp.where(removed, self._errors(outputs.pixels, images), 0).sum(1)
        return {
            "masked": self._whole(jnp.where(removed[:, :, None], 0.0, target)),
            "reconstructed": self._whole(jnp.where(removed[:, :, None], predicted, target)),
            "error": errors / removed.sum(1),
        }

    def _whole(self, patches: Array) -> Array:
        """Returns patches `[b, patches, n]` as images in the range of the pipeline."""
        (rows, columns), (height, width) = self._grid, pair(self.model.backbone.patch_size)
        x = patches.reshape(len(patches), rows, columns, height, width, -1)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(len(patches), rows * height, columns * width, -1)
        return self.shown(x)

    def pictures(self, examples: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Returns each image beside what the encoder saw of it and the reconstruction.

        Rows and columns that fill no patch are left out of the image, too.
        """
        height, width = examples["masked"].shape[1:3]
        names = ("image", "masked", "reconstructed")
        columns = (examples[name][:, :height, :width] for name in names)
        return [np.concatenate(row, axis=1) for row in zip(*columns, strict=True)]

    def sections(self, examples: Mapping[str, np.ndarray]) -> list[Section]:
        """Returns a section with the reconstructions of the first images."""
        from vit_jax.report import figures  # matplotlib, which training can do without

        figure = figures.image_grid(self.pictures(examples), self.summaries(examples))
        share = 1 - self._num_kept() / self._num_patches()
        text = (
            f"Each image, what is left of it without {share:.0%} of its patches, and the model's"
            " reconstruction from that."
        )
        alt = "Rows of an image, its visible patches, and its reconstruction."
        return [Section("Reconstructions", text, figure, alt=alt)]


def _check_width(where: str, width: int) -> None:
    """Raises a `UserError` where there is no table of sines and cosines of this width."""
    if width % 4:
        raise UserError(
            f"config.{where}.width={width}: the sines and cosines of two axes need a number that 4"
            " divides"
        )
