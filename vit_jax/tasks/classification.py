"""Image classification: one label, or several, for each image.

The plug-in that other tasks copy: fields are the keys of `config.task`, methods are
`TaskProtocol`'s.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import models
from vit_jax.augment import randaugment as _randaugment
from vit_jax.augment.images import (
    check_affine,
    check_data,
    check_geometry,
    check_not_negative,
    check_share,
    check_statistics,
    cutmix,
    erase,
    mixup,
    normalise,
    random_affine,
)
from vit_jax.errors import UserError
from vit_jax.report import Section
from vit_jax.tasks import _classes
from vit_jax.tasks._distill import Teacher
from vit_jax.tracking.metrics import COUNT, LOSS, SCORE, Metric
from vit_jax.types import TEACHER, Array, Batch, DataInfo, Params

LOSSES = {
    "softmax": optax.softmax_cross_entropy,
    "sigmoid": lambda logits, labels: optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1),
}
_NO_ANSWER = -1e30
HARDEST = 24
"""Mistakes that the report shows."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Classification with softmax or sigmoid cross-entropy.

    loss: "softmax", or "sigmoid" (each class on its own, summed over classes).
    label_smoothing: share of the target that is spread evenly over all classes.
    mixup, cutmix: Beta parameter of each, 0 = off. With both, a fair coin picks one a batch.
    multihot_mixing: a mixed image is in full an example of both its classes, for the sigmoid loss
      (Wightman et al. 2021, "ResNet strikes back", section 2.2; DeiT III).
    erasing: share of the images of which a box is replaced by noise, before mixing.
    class_weights: one number a class that its terms of the loss are multiplied by; softmax losses
      are then divided by the sum of their targets' weights, as PyTorch does.
    distill: the keys of `tasks._distill.Teacher`, and `model`: a teacher to imitate. With
      `config.model.distill_token` the second head does, else the one that learns the labels.
    affine: bounds of random distortions on the device: {rotate, shift, scale, shear}; {} = off.
    randaug: RandAugment on the device: {num_layers, magnitude, corrected}, of which those left out
      are as for the preprocessing op of this name; {} = off.
    mean, std: of uint8 images, in 0..255, one value or one a channel; the defaults give [-1, 1].
    crop_to_patches: accept images whose last rows and columns fill no patch and are dropped.
    """

    model: nn.Module
    info: DataInfo
    loss: str = "softmax"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    multihot_mixing: bool = False
    erasing: float = 0.0
    class_weights: tuple[float, ...] = ()
    distill: Mapping[str, Any] | None = None
    affine: Mapping[str, float] = dataclasses.field(default_factory=dict)
    randaug: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)
    crop_to_patches: bool = False
    teacher: Teacher | None = dataclasses.field(default=None, init=False)

    headline = "accuracy"
    metric_info: ClassVar[Mapping[str, Metric]] = {
        "accuracy": SCORE,
        "top5_accuracy": SCORE,
        "loss": LOSS,
        "num_examples": COUNT,
    }
    pictured = 10_000

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "Task":
        """The task around the backbone of `config.model`.

        Raises:
          UserError: a field has no such value, or the data has no images or labels of this kind.
        """
        backbone = models.build(**{"num_classes": info.num_classes, **model})
        given = model.get("num_classes", info.num_classes)
        if given != info.num_classes:
            raise UserError(
                f"config.model.num_classes={given}, but the data has {info.num_classes} classes;"
                " leave it out"
            )
        task = cls(backbone, info, **fields)
        task._check_fields()
        task._check_data()
        return task

    def __post_init__(self) -> None:
        if self.distill:
            teacher = Teacher.create(self.distill, self.info.num_classes)
            object.__setattr__(self, "teacher", teacher)

    def _check_fields(self) -> None:
        num_classes = self.info.num_classes
        if self.loss not in LOSSES:
            raise UserError(f"config.task.loss={self.loss!r}: write {' or '.join(LOSSES)}")
        check_share(label_smoothing=self.label_smoothing, erasing=self.erasing)
        check_not_negative(mixup=self.mixup, cutmix=self.cutmix)
        check_affine(self.affine)
        if self.class_weights and len(self.class_weights) != num_classes:
            raise UserError(
                f"config.task.class_weights has {len(self.class_weights)} numbers; write one for"
                f" each of the {num_classes} classes"
            )
        if self.multihot_mixing and (self.loss != "sigmoid" or self.label_smoothing):
            raise UserError(
                "config.task.multihot_mixing makes labels of ones and zeros: write loss='sigmoid'"
                " and label_smoothing=0"
            )
        backbone = getattr(self.model, "backbone", self.model)
        if getattr(backbone, "distill_token", False) and not self.teacher:
            raise UserError("config.model.distill_token needs a teacher: set config.task.distill")

    def _check_data(self) -> None:
        wanted = {
            "image": "uint8 or float32 [height, width, channels]",
            "label": f"int32 [] or float32 [{self.info.num_classes}]",
        }
        image, label = (self.info.spec.get(name) for name in wanted)
        image_fits = image is not None and len(image.shape) == 3
        label_fits = label is not None and label.shape in ((), (self.info.num_classes,))
        check_data("classification", wanted, self.info, image_fits and label_fits)
        check_geometry(self.model, image.shape, self.crop_to_patches)
        check_statistics(self.mean, self.std, image.shape[-1])
        _randaugment.check(self.randaug, image)

    def init(self, key: Array) -> Params:
        """Fresh parameters, boxed with their logical axis names."""
        images = jnp.zeros((1, *self.info.spec["image"].shape), jnp.float32)
        params = self.model.init(key, images)["params"]
        if self.teacher:
            params = {**params, TEACHER: self.teacher.network.init(key, images)["params"]}
        return params

    def perturb(self, batch: Batch, key: Array) -> Batch:
        """Normalised images and soft labels of the training batch: augmented, erased, mixed."""
        key_coin, key_mix, key_erase, key_distort, key_augment = jax.random.split(key, 5)
        if self.affine:
            batch = {**batch, "image": random_affine(key_distort, batch["image"], **self.affine)}
        if self.randaug:
            images = _randaugment.augment(key_augment, batch["image"], **self.randaug)
            batch = {**batch, "image": images}
        images = self.inputs(batch)
        labels = self._soft_labels(batch["label"])
        if self.erasing:
            images = erase(key_erase, self.erasing, images)
        if self.mixup and self.cutmix:
            images, labels = jax.lax.cond(
                jax.random.bernoulli(key_coin),
                lambda: mixup(key_mix, self.mixup, images, labels),
                lambda: cutmix(key_mix, self.cutmix, images, labels),
            )
        elif self.mixup:
            images, labels = mixup(key_mix, self.mixup, images, labels)
        elif self.cutmix:
            images, labels = cutmix(key_mix, self.cutmix, images, labels)
        if self.multihot_mixing:
            labels = (labels > 0).astype(jnp.float32)
        return {"image": images, "label": labels}

    def _soft_labels(self, labels: Array) -> Array:
        dense = self._dense_labels(labels)
        return optax.smooth_labels(dense, self.label_smoothing) if self.label_smoothing else dense

    def _dense_labels(self, labels: Array) -> Array:
        """int32 `[b]` → one-hot `[b, classes]`; multi-hot rows pass."""
        if labels.ndim == 1:
            return jax.nn.one_hot(labels, self.info.num_classes)
        return labels.astype(jnp.float32)

    def objective(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """(sum of the examples' losses, their number or weight) of a perturbed micro-batch."""
        images = batch["image"]
        logits = self.model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        logits, imitating = logits if isinstance(logits, tuple) else (logits, logits)
        losses, weights = self._weighted_losses(logits, batch["label"])
        if self.teacher:
            imitation = weights * self.teacher.losses(imitating, params, images)
            losses = (1 - self.teacher.weight) * losses + self.teacher.weight * imitation
        return losses.sum(), weights.sum()

    def _weighted_losses(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """Losses `[b]` and what each counts in the mean `[b]`: 1, or its target's weight."""
        ones = jnp.ones(len(labels), jnp.float32)
        if not self.class_weights:
            return LOSSES[self.loss](logits, labels), ones
        by_class = jnp.asarray(self.class_weights, jnp.float32)[None]
        if self.loss == "softmax":
            labels = by_class * labels
            return LOSSES["softmax"](logits, labels), labels.sum(-1)
        return (by_class * optax.sigmoid_binary_cross_entropy(logits, labels)).sum(-1), ones

    def inputs(self, batch: Batch) -> Array:
        """The images of a batch from the pipeline, as the model takes them."""
        return normalise(jnp.asarray(batch["image"]), self.mean, self.std)

    def logits(self, params: Params, batch: Batch) -> Array:
        """Inference logits `[b, classes]` of a batch as it comes from the pipeline."""
        return self.model.apply({"params": params}, self.inputs(batch))

    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Sums over the real rows: loss, examples, top-1 and top-5 hits and those scored for them.

        A multi-hot row is a hit where the top class is among its labels; a row without any label
        is left out of the accuracy (as ImageNet-ReaL is scored: Beyer et al. 2020, section 3).
        Where the batch has `allowed` (see the op `only_classes`), the other classes are no answers.
        """
        logits = self.logits(params, batch)
        if "allowed" in batch:
            logits = jnp.where(batch["allowed"] > 0, logits, _NO_ANSWER)
        labels = self._dense_labels(batch["label"])
        real = batch["mask"] > 0
        scored = real & (labels.max(-1) > 0)
        top = jax.lax.top_k(logits, min(5, self.info.num_classes))[1]
        hits = jnp.take_along_axis(labels, top, axis=-1) > 0
        losses = LOSSES[self.loss](logits, labels)

        def count(rows: Array) -> Array:
            return rows.sum(dtype=jnp.int32)

        return {
            "examples": count(real),
            "scored": count(scored),
            "top1": count(scored & hits[:, 0]),
            "top5": count(scored & hits.any(-1)),
            "loss": jnp.where(real, losses, 0).sum(),
        }

    def eval_rows(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Nothing: the metrics are made of sums."""
        return {}

    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`accuracy` (top-1), `top5_accuracy`, mean `loss` and `num_examples` of a split."""
        examples, scored = int(found["examples"]), int(found["scored"])
        return {
            "accuracy": int(found["top1"]) / max(1, scored),
            "top5_accuracy": int(found["top5"]) / max(1, scored),
            "loss": float(found["loss"]) / max(1, examples),
            "num_examples": examples,
        }

    def captions(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """One line for each predicted example: the class, with its probability."""
        return _classes.best(examples["probability"], self._names())

    def lines(self, examples: Mapping[str, np.ndarray], top: int) -> list[list[str]]:
        """The `top` most probable classes of each image, most probable first."""
        return _classes.ranking(examples["probability"], self._names(), top)

    def pictures(self, examples: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The images as they are: a class has no place in them."""
        return list(examples["image"])

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """`probability` `[b, classes]` of each image: softmax or sigmoid, as it was trained."""
        logits = self.logits(params, batch)
        squash = jax.nn.softmax if self.loss == "softmax" else jax.nn.sigmoid
        return {"probability": squash(logits)}

    def sections(self, examples: Mapping[str, np.ndarray]) -> list[Section]:
        """Confusion matrix (up to 100 classes) and the hardest mistakes."""
        from vit_jax.report import figures  # matplotlib, which training can do without

        labels, probability = examples["label"], examples["probability"]
        if labels.ndim > 1:
            return []
        predicted = probability.argmax(-1)
        names = self._names()
        sections = []
        if len(names) <= 100:
            matrix = np.zeros((len(names), len(names)), np.int64)
            np.add.at(matrix, (labels, predicted), 1)
            sections.append(
                Section(
                    "Confusion matrix",
                    "Rows are the true classes, columns what the model said.",
                    figures.confusion_matrix(matrix, names),
                )
            )
        wrong = int((predicted != labels).sum())
        text = f"{wrong} of {len(labels)} images are misread."
        if wrong:
            text += " Shown are those whose true class got the least probability."
        hardest = figures.hardest_mistakes(examples["image"], labels, probability, names, HARDEST)
        return [*sections, Section("The hardest mistakes", text, hardest)]

    def _names(self) -> tuple[str, ...]:
        return self.info.class_names or tuple(map(str, range(self.info.num_classes)))
