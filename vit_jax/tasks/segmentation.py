"""Semantic segmentation: one class for every pixel.

An example has an `image` and a `segmentation`, integers `[h, w, 1]` in which 255 is "not labeled".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import models
from vit_jax.augment.images import NO_LABEL
from vit_jax.data.placement import Placement
from vit_jax.errors import UserError
from vit_jax.report import Section, drawing
from vit_jax.tasks._base import BaseTask
from vit_jax.tasks._checks import check_data, check_not_negative
from vit_jax.tasks._sliding import covers, over_scales, slide
from vit_jax.tracking.metrics import COUNT, SCORE, Metric
from vit_jax.tracking.plain_text import distinct
from vit_jax.types import Array, Batch, DataInfo, Params

_LIMB = 12
"""A count of a batch is kept as two int32 numbers, the low one of this many bits.

Their sums are exact for 2^19 batches and 2^43 pixels, such as 28 million images of 640×480.
"""


@dataclasses.dataclass(frozen=True)
class Task(BaseTask):
    """Segmentation with per-pixel softmax cross-entropy.

    Attributes:
      num_classes: 0 takes the number of classes of the data.
      class_names: a name for each class, for data that has none.
      head, subcells, decoder_width, decoder_depth, decoder_dropout, pyramid, pyramid_width: see
        `models.Segmenter`.
      dice: the weight of the dice loss, which is added to the cross-entropy.
      stride: pixels, or (down, right), between windows of the training size that evaluation slides
        over larger images; 0 evaluates whole images.
      scales, mirror: evaluation averages over images resized by these factors, and mirrored ones.
      affine, elastic, cutmix: see `augment.spec.Augmentation`. The labels move with the pixels.
    """

    num_classes: int = 0
    class_names: Sequence[str] = ()
    head: str = "linear"
    subcells: int = 1
    decoder_width: int = 0
    decoder_depth: int = 2
    decoder_dropout: float = 0.0
    pyramid: Sequence[float] = ()
    pyramid_width: int = 256
    dice: float = 0.0
    stride: int | Sequence[int] = 0
    scales: Sequence[float] = (1.0,)
    mirror: bool = False
    affine: Mapping[str, float] = dataclasses.field(default_factory=dict)
    elastic: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cutmix: float = 0.0

    headline = "miou"
    placed_labels: ClassVar[tuple[str, ...]] = ("segmentation",)
    of_evaluation: ClassVar[tuple[str, ...]] = ("class_names", "stride", "scales", "mirror")
    metric_info: ClassVar[Mapping[str, Metric]] = {
        "miou": SCORE,
        "pixel_accuracy": SCORE,
        "iou/*": SCORE,
        "num_examples": COUNT,
    }

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "Task":
        """Returns the task around the backbone of `config.model`.

        Raises:
          UserError: a field has no such value, or the data has no images with segmentations.
        """
        task = cls(models.build(**model), info, **fields)
        num_classes = task.num_classes or info.num_classes
        if not 2 <= num_classes < NO_LABEL:
            raise UserError(
                f"config.task.num_classes={num_classes}: write the number of classes, 2 to"
                f" {NO_LABEL - 1}; the data does not tell it"
            )
        if task.class_names and len(task.class_names) != num_classes:
            raise UserError(
                f"config.task.class_names has {len(task.class_names)} names for {num_classes}"
                " classes"
            )
        wanted = {
            "image": "uint8 or float32 [height, width, channels]",
            "segmentation": "uint8 or int32 [height, width, 1]",
        }
        image, marks = (info.spec.get(name) for name in wanted)
        fits = (
            image is not None
            and marks is not None
            and len(image.shape) == 3
            and marks.shape == (*image.shape[:2], 1)
        )
        check_data("segmentation", wanted, info, fits)
        task.check_images()
        check_not_negative(dice=task.dice)
        head = {"head", "subcells", "pyramid", "pyramid_width"}
        head |= {"decoder_width", "decoder_depth", "decoder_dropout"}
        whole = models.Segmenter(
            task.model, num_classes, **{name: getattr(task, name) for name in head}
        )
        task = dataclasses.replace(task, model=whole, num_classes=num_classes)
        task._check_evaluation()
        return task

    def _check_evaluation(self) -> None:
        """Raises a `UserError` if windows would leave pixels out, or the model takes no scale."""
        window = self.info.spec["image"].shape[:2]
        if self.stride and not covers(self._stride(), window):
            raise UserError(
                f"config.task.stride={self.stride}: windows of {window[0]}x{window[1]} pixels would"
                " leave some out; write 1 to the window's side, one number or (down, right)"
            )
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"config.task.scales={list(self.scales)}: write one factor or more")
        if self.stride or tuple(self.scales) == (1.0,):
            return
        images = {"image": jnp.zeros((1, *self.info.spec["image"].shape), jnp.float32)}
        shapes = jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)))
        try:
            jax.eval_shape(lambda params: self._probability(params, images), nn.unbox(shapes))
        except UserError as error:
            raise UserError(
                f"config.task.scales={list(self.scales)}: {error}; or write config.task.stride, for"
                " windows of the training size"
            ) from error

    def targets(self, batch: Batch) -> dict[str, Array]:
        """Returns `label`, int32 `[b, h, w]`."""
        return {"label": _labels(batch)}

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the losses of the labeled pixels, their number) of a micro-batch."""
        logits = models.outputs_of(
            self.model, params, batch["image"], train=True, rngs={"dropout": key}
        )
        labeled = self._is_labeled(batch["label"])
        losses = self._losses(logits, batch["label"])
        if self.dice:
            losses += self.dice * self._dice(logits, batch["label"])[:, None, None]
        return jnp.where(labeled, losses, 0).sum(), labeled.sum(dtype=jnp.float32)

    def _losses(self, logits: Array, labels: Array) -> Array:
        """Returns the cross-entropy of every pixel, `[b, h, w]`, arbitrary without a label."""
        classes = jnp.clip(labels, 0, self.num_classes - 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, classes)

    def _dice(self, logits: Array, labels: Array) -> Array:
        """Returns 1 - dice coefficient `[b]` (Milletari et al. 2016), a mean over classes present.

        Each labeled pixel has it as a part of its loss, so that an image counts by those pixels.
        """
        labeled = self._is_labeled(labels)[..., None]
        truth = jax.nn.one_hot(labels, self.num_classes) * labeled
        predicted = jax.nn.softmax(logits) * labeled
        both, either = (truth * predicted).sum((1, 2)), (truth + predicted).sum((1, 2))
        present = truth.any((1, 2))
        losses = jnp.where(present, 1 - 2 * both / jnp.maximum(either, 1), 0)
        return losses.sum(-1) / jnp.maximum(present.sum(-1), 1)

    def _is_labeled(self, labels: Array) -> Array:
        return (labels >= 0) & (labels < self.num_classes)

    def _stride(self) -> tuple[int, ...]:
        """Returns the pixels between windows, (down, right)."""
        return (self.stride,) * 2 if isinstance(self.stride, int) else tuple(self.stride)

    def _probability(self, params: Params, batch: Batch) -> Array:
        """Returns class probabilities `[b, h, w, classes]`, or logits if nothing is averaged."""

        def whole(images: Array) -> Array:
            return models.outputs_of(self.model, params, images)

        def windows(images: Array) -> Array:
            return slide(whole, images, self.info.spec["image"].shape[:2], self._stride())

        look = windows if self.stride else whole
        if tuple(self.scales) == (1.0,) and not self.mirror:
            return look(self.inputs(batch))
        return over_scales(look, self.inputs(batch), self.scales, self.mirror)

    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the confusion matrix of the labeled pixels of real rows, its rows the truth.

        Each count is split into two numbers; see `_LIMB`. `invalid` counts the images with a label
        that is neither a class nor 255. A pixel whose scores are not finite counts as the class
        after its own, which is wrong.
        """
        labels, real = _labels(batch), batch["mask"] > 0
        scores = self._probability(params, batch)
        another = (labels + 1) % self.num_classes
        predicted = jnp.where(jnp.isfinite(scores).all(-1), scores.argmax(-1), another)
        labeled = self._is_labeled(labels) & real[:, None, None]
        cells = self.num_classes**2
        pairs = jnp.where(labeled, labels * self.num_classes + predicted, cells)
        # One count per image keeps the scatter on the device of the image.
        counts = jax.vmap(lambda image: jnp.bincount(image.ravel(), length=cells))(pairs)
        counts = counts.sum(0, dtype=jnp.int32)
        valid = self._is_labeled(labels) | (labels == NO_LABEL)
        return {
            "examples": real.sum(dtype=jnp.int32),
            "confusion_low": counts & ((1 << _LIMB) - 1),
            "confusion_high": counts >> _LIMB,
            "invalid": (~valid & real[:, None, None]).any((1, 2)).sum(dtype=jnp.int32),
        }

    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns `miou`, `pixel_accuracy`, `iou/CLASS` and `num_examples` of a split.

        The mean is over the classes that occur, in the truth or in predictions; without any pixel
        that is labeled it is 0.

        Raises:
          UserError: some labels are not classes.
        """
        if found["invalid"]:
            raise UserError(
                f"{int(found['invalid'])} images have labels that are neither one of"
                f" {self.num_classes} classes nor {NO_LABEL}; put check_segmentation"
                f"({self.num_classes}) into config.data.pp and eval_pp to learn in which record"
            )
        low, high = (found[f"confusion_{limb}"].astype(np.int64) for limb in ("low", "high"))
        matrix = (low + (high << _LIMB)).reshape(self.num_classes, -1)
        right = np.diag(matrix)
        union = matrix.sum(0) + matrix.sum(1) - right
        occurs = union > 0
        iou = right / np.maximum(union, 1)
        names = distinct(self._names())
        each = {f"iou/{name}": iou[i] for i, name in enumerate(names) if occurs[i]}
        return {
            "miou": float(iou[occurs].mean()) if occurs.any() else 0.0,
            "pixel_accuracy": right.sum() / max(1, matrix.sum()),
            **{name: float(value) for name, value in each.items()},
            "num_examples": int(found["examples"]),
        }

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns `predicted`, the class of each pixel, uint8 `[b, h, w]`."""
        return {"predicted": self._probability(params, batch).argmax(-1).astype(jnp.uint8)}

    def in_files(
        self, examples: Mapping[str, np.ndarray], placements: Sequence[Placement]
    ) -> dict[str, Any]:
        """Returns `predicted` for the pixels of the files that images were prepared from.

        The result is a list, because files have different sizes. Pixels that preprocessing cut away
        get the label `NO_LABEL`.

        examples: images as the pipeline gives them, with the outputs of `predict`.
        """
        pairs = zip(examples["predicted"], placements, strict=True)
        return {"predicted": [place.labels(predicted) for predicted, place in pairs]}

    def summaries(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the two largest classes of each image on one line."""
        return [", ".join(lines) for lines in self.result_lines(examples, 2)]

    def result_lines(self, examples: Mapping[str, np.ndarray], top: int) -> list[list[str]]:
        """Returns the `top` classes of each image, largest first.

        Each has its share of the pixels that the model saw.
        """
        names, found = self._names(), []
        for predicted in examples["predicted"]:
            counts = np.bincount(predicted.ravel(), minlength=len(names))[: len(names)]
            share = counts / max(1, counts.sum())
            order = [i for i in np.argsort(-share, kind="stable")[:top] if share[i] > 0]
            found.append([f"{share[i]:6.1%} {names[i]}".strip() for i in order])
        return found

    def pictures(self, examples: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Returns each image tinted by the predicted classes, with their names."""
        return self._pictures(examples["image"], examples["predicted"])

    def sections(self, examples: Mapping[str, np.ndarray]) -> list[Section]:
        """Returns a section that compares predictions with the ground truth."""
        from vit_jax.report import inside  # matplotlib, which training can do without

        pictures = [drawing.rgb(image) for image in examples["image"]]
        truth = self._pictures(examples["image"], examples["segmentation"])
        rows = {"truth": truth, "predicted": self.pictures(examples)}
        return [
            Section(
                "Segmentations beside the truth",
                "The color tells the class; gray is not labeled.",
                inside.attention_panel(pictures, rows),
                alt="Images, tinted below by their true classes and by the predicted ones.",
            )
        ]

    def _pictures(self, images: np.ndarray, segmentations: np.ndarray) -> list[np.ndarray]:
        tinted = map(drawing.with_segmentation, images, segmentations)
        names = self._names()
        return [
            drawing.with_names(picture, marks, names)
            for picture, marks in zip(tinted, segmentations, strict=True)
        ]

    def _names(self) -> tuple[str, ...]:
        names = tuple(self.class_names) or self.info.class_names or ()
        numbers = tuple(map(str, range(self.num_classes)))
        return names if len(names) == self.num_classes else numbers


def _labels(batch: Batch) -> Array:
    """Returns the labels of a batch, int32 `[b, h, w]`."""
    return jnp.asarray(batch["segmentation"])[..., 0].astype(jnp.int32)
