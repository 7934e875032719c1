"""Image classification: one label, or several, for each image.

An example has an `image` and a `label`, int32 `[]` or the probabilities of the classes, float32
`[classes]`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import models
from vit_jax.errors import UserError, quoted
from vit_jax.models.published import TEACHER
from vit_jax.report import Section
from vit_jax.tasks import _classes
from vit_jax.tasks._base import BaseTask
from vit_jax.tasks._checks import check_data, check_not_negative, check_share
from vit_jax.tasks._class_metrics import Reliability, class_metrics, class_sums, top_classes
from vit_jax.tasks._distill import Teacher
from vit_jax.tracking.metrics import COUNT, LOSS, SCORE, Metric
from vit_jax.types import Array, Batch, DataInfo, Params

LOSSES = {
    "softmax": optax.softmax_cross_entropy,
    "sigmoid": lambda logits, labels: optax.sigmoid_binary_cross_entropy(logits, labels).sum(-1),
}
_NO_ANSWER = -1e30
HARDEST = 24
"""The number of mistakes that the report shows."""


@dataclasses.dataclass(frozen=True)
class Task(BaseTask):
    """Classification with softmax or sigmoid cross-entropy.

    Attributes:
      loss: "softmax", or "sigmoid" (each class on its own, summed over classes).
      label_smoothing: the share of the target that is spread evenly over all classes.
      affine, elastic, randaug, erasing, mixup, cutmix, mixing_groups: see
        `augment.spec.Augmentation`.
      multihot_mixing: makes a mixed image a full example of both its classes, for the sigmoid loss
        (Wightman et al. 2021, "ResNet strikes back", section 2.2; DeiT III).
      class_weights: one factor for each class, of its terms in the loss. Softmax losses are divided
        by the sum of the weights of their targets, as in PyTorch. "balanced" gives n / (classes *
        examples of the class), as in scikit-learn.
      focal_gamma: the exponent of the focal loss (Lin et al. 2017), which gives less weight to what
        is answered well; 0 = off, the paper has 2.
      logit_adjustment: the factor of the log of the classes' frequencies that training adds to the
        logits (Menon et al. 2021, section 5.2), so that rare classes are answered as often as
        frequent ones; 0 = off, the paper has 1.
      distill: a teacher to imitate: the keys of `tasks._distill.Teacher`, and `model`. With
        `config.model.distill_token` the second head imitates it, else the one that learns the
        labels.
      teacher: the teacher that `distill` describes.
    """

    loss: str = "softmax"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixing_groups: int = 1
    multihot_mixing: bool = False
    erasing: float = 0.0
    class_weights: str | tuple[float, ...] = ()
    focal_gamma: float = 0.0
    logit_adjustment: float = 0.0
    distill: Mapping[str, Any] | None = None
    affine: Mapping[str, float] = dataclasses.field(default_factory=dict)
    elastic: Mapping[str, float] = dataclasses.field(default_factory=dict)
    randaug: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher: Teacher | None = dataclasses.field(default=None, init=False)

    headline = "accuracy"
    metric_info: ClassVar[Mapping[str, Metric]] = {
        "accuracy": SCORE,
        "top5_accuracy": SCORE,
        "balanced_accuracy": SCORE,
        "f1": SCORE,
        "ece": Metric(higher_is_better=False, unit="fraction"),
        "loss": LOSS,
        "num_examples": COUNT,
    }
    num_shown = 10_000

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "Task":
        """Returns the task around the backbone of `config.model`.

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
        task._check_counts()
        return task

    def __post_init__(self) -> None:
        if self.distill:
            teacher = Teacher.create(self.distill, self.info.num_classes)
            object.__setattr__(self, "teacher", teacher)

    def _check_fields(self) -> None:
        num_classes = self.info.num_classes
        if self.loss not in LOSSES:
            raise UserError(f"config.task.loss={self.loss!r}: write {' or '.join(LOSSES)}")
        check_share(label_smoothing=self.label_smoothing)
        check_not_negative(focal_gamma=self.focal_gamma, logit_adjustment=self.logit_adjustment)
        if self.logit_adjustment and self.loss != "softmax":
            raise UserError("config.task.logit_adjustment needs loss='softmax'")
        if isinstance(self.class_weights, str):
            if self.class_weights != "balanced":
                raise UserError(
                    f"config.task.class_weights={self.class_weights!r}: write balanced, or numbers"
                )
        elif self.class_weights and len(self.class_weights) != num_classes:
            raise UserError(
                f"config.task.class_weights has {len(self.class_weights)} numbers; write one for"
                f" each of the {num_classes} classes"
            )
        elif self.class_weights and (min(self.class_weights) < 0 or not any(self.class_weights)):
            raise UserError(
                f"config.task.class_weights={quoted(list(self.class_weights))}: write numbers of 0"
                " or more, not all of them 0"
            )
        if self.multihot_mixing and (self.loss != "sigmoid" or self.label_smoothing):
            raise UserError(
                "config.task.multihot_mixing makes labels of ones and zeros: write loss='sigmoid'"
                " and label_smoothing=0"
            )

    def _check_data(self) -> None:
        wanted = {
            "image": "uint8 or float32 [height, width, channels]",
            "label": f"int32 [] or float32 [{self.info.num_classes}]",
        }
        image, label = (self.info.spec.get(name) for name in wanted)
        image_fits = image is not None and len(image.shape) == 3
        label_fits = label is not None and (
            label.shape == (self.info.num_classes,)
            or (label.shape == () and np.issubdtype(label.dtype, np.integer))
        )
        check_data("classification", wanted, self.info, image_fits and label_fits)
        self.check_images()

    def _check_counts(self) -> None:
        """Raises a `UserError` for a field that needs numbers that the source does not know."""
        wanted = {
            "class_weights": self.class_weights == "balanced",
            "logit_adjustment": self.logit_adjustment > 0,
        }
        for field, needs_counts in wanted.items():
            if needs_counts and self.info.class_counts == ():
                raise UserError(
                    f"config.task.{field}={getattr(self, field)!r}: this source does not count its"
                    " classes; folder, table, webdataset, idx and npz do, and tfds with"
                    " config.data.args.count_labels=true"
                )

    def init(self, key: Array) -> Params:
        """Returns fresh parameters, with the teacher's if there is one, in boxes."""
        params = super().init(key)
        if not self.teacher:
            return params
        images = jnp.zeros((1, *self.info.spec["image"].shape), jnp.float32)
        return {**params, TEACHER: self.teacher.network.init(key, images)["params"]}

    def loaded_params(self) -> Params:
        """Returns the parameters of the teacher, if there is one."""
        if not self.teacher:
            return {}
        return {TEACHER: self.teacher.load(self.info.spec["image"].shape)}

    def frozen(self, params: Params, patterns: Sequence[str]) -> list[str]:
        """Returns `patterns`, and the teacher's parameters, which are never trained."""
        return [*patterns, f"{TEACHER}/.*"] if self.teacher else list(patterns)

    def inference_params(self, params: Params) -> Params:
        """Returns the parameters without the teacher's."""
        return {name: tree for name, tree in params.items() if name != TEACHER}

    def targets(self, batch: Batch) -> dict[str, Array]:
        """Returns `label`, the probability of each class, float32 `[b, classes]`.

        The weight of each example comes with it, if the data has weights.
        """
        weight = {name: x for name, x in batch.items() if name == "weight"}
        return {"label": self._soft_labels(batch["label"]), **weight}

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns normalized images and soft labels, augmented."""
        batch = super().augment(batch, key)
        if self.multihot_mixing:
            return {**batch, "label": (batch["label"] > 0).astype(jnp.float32)}
        return batch

    def _soft_labels(self, labels: Array) -> Array:
        dense = self._dense_labels(labels)
        return optax.smooth_labels(dense, self.label_smoothing) if self.label_smoothing else dense

    def _dense_labels(self, labels: Array) -> Array:
        """Returns labels int32 `[b]` as one-hot rows `[b, classes]`; rows of floats pass."""
        if labels.ndim == 1:
            return jax.nn.one_hot(labels, self.info.num_classes)
        return labels.astype(jnp.float32)

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the examples' losses, their number or weight) of a micro-batch.

        If the model has a second head but no teacher to imitate, the mean of both heads' logits
        learns the labels; evaluation reads the same mean.
        """
        images = batch["image"]
        found = models.outputs_of(self.model, params, images, train=True, rngs={"dropout": key})
        logits, imitating = found if isinstance(found, tuple) else (found, found)
        if isinstance(found, tuple) and not self.teacher:
            logits = (logits + imitating) / 2
        if self.logit_adjustment:
            frequency = np.maximum(self._class_counts(), 1)
            prior = np.log(frequency / frequency.sum(), dtype=np.float32)
            logits = logits + self.logit_adjustment * prior[None]
        losses, weights = self._weighted_losses(logits, batch["label"])
        if "weight" in batch:
            losses, weights = losses * batch["weight"], weights * batch["weight"]
        if self.teacher:
            imitation = weights * self.teacher.losses(imitating, params, images)
            losses = (1 - self.teacher.weight) * losses + self.teacher.weight * imitation
        return losses.sum(), weights.sum()

    def _weighted_losses(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """Returns losses `[b]` and the weight of each in the mean `[b]`: 1, or its target's."""
        ones = jnp.ones(len(labels), jnp.float32)
        weights = self._class_weights()
        if weights is None:
            return self._losses(logits, labels), ones
        if self.loss == "softmax":
            labels = labels * weights[None]
            return self._losses(logits, labels), labels.sum(-1)
        return (weights[None] * self._sigmoid_losses(logits, labels)).sum(-1), ones

    def _losses(self, logits: Array, labels: Array) -> Array:
        """Returns the loss of each row `[b]`, before weights."""
        if not self.focal_gamma:
            return LOSSES[self.loss](logits, labels)
        if self.loss == "sigmoid":
            return self._sigmoid_losses(logits, labels).sum(-1)
        log_share = jax.nn.log_softmax(logits)
        # The derivative of a power below 1 is infinite at 0.
        rest = jnp.maximum(-jnp.expm1(log_share), jnp.finfo(log_share.dtype).tiny)
        return -(labels * rest**self.focal_gamma * log_share).sum(-1)

    def _sigmoid_losses(self, logits: Array, labels: Array) -> Array:
        """Returns the loss of each class of each row `[b, classes]`."""
        if not self.focal_gamma:
            return optax.sigmoid_binary_cross_entropy(logits, labels)
        return optax.sigmoid_focal_loss(logits, labels, gamma=self.focal_gamma)

    def _class_weights(self) -> np.ndarray | None:
        """Returns the weight of each class, float32 `[classes]`; None without weights."""
        if not self.class_weights:
            return None
        if self.class_weights != "balanced":
            return np.asarray(self.class_weights, np.float32)
        counts = self._class_counts()
        there = np.maximum((counts > 0).sum(), 1)
        return (counts.sum() / (there * np.maximum(counts, 1))).astype(np.float32)

    def _class_counts(self) -> np.ndarray:
        """Returns the number of training examples of each class, int64 `[classes]`.

        They are equal where nothing is trained, for what is computed from them is not used there.
        """
        return np.array(self.info.class_counts or [1] * self.info.num_classes)

    def logits(self, params: Params, batch: Batch) -> Array:
        """Returns inference logits `[b, classes]` of a batch from the pipeline."""
        return models.outputs_of(self.model, params, self.inputs(batch))

    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns sums over the real rows: loss, examples, scored rows, top-1 and top-5 hits.

        A row with several labels is a hit if the top class is among them; a row without any label
        is not scored (Beyer et al. 2020, section 3, ImageNet-ReaL). A row whose logits are not
        finite is no hit. If the batch has `allowed` (see
        the op `only_classes`), the other classes are no answers.
        """
        logits = self.logits(params, batch)
        if "allowed" in batch:
            logits = jnp.where(batch["allowed"] > 0, logits, _NO_ANSWER)
        labels = self._dense_labels(batch["label"])
        real = batch["mask"] > 0
        scored = real & (labels.max(-1) > 0)
        top = top_classes(logits, min(5, self.info.num_classes))
        hits = (jnp.take_along_axis(labels, jnp.maximum(top, 0), axis=-1) > 0) & (top >= 0)
        losses = LOSSES[self.loss](logits, labels)

        def count(rows: Array) -> Array:
            return rows.sum(dtype=jnp.int32)

        sums = {
            "examples": count(real),
            "scored": count(scored),
            "top1": count(scored & hits[:, 0]),
            "top5": count(scored & hits.any(-1)),
            "loss": jnp.where(real, losses, 0).sum(),
        }
        if batch["label"].ndim > 1:
            return sums
        logits = logits.astype(jnp.float32)
        shares = jax.nn.softmax(logits) if self.loss == "softmax" else jax.nn.sigmoid(logits)
        classes = self.info.num_classes
        return sums | class_sums(batch["label"], top[:, 0], shares.max(-1), scored, classes)

    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns `accuracy` (top-1), mean `loss` and `num_examples`.

        With more than five classes, `top5_accuracy` too; and where each image has one label, those
        of `class_metrics`.
        """
        examples, scored = int(found["examples"]), int(found["scored"])
        top5 = {"top5_accuracy": int(found["top5"]) / max(1, scored)}
        return {
            "accuracy": int(found["top1"]) / max(1, scored),
            **(top5 if self.info.num_classes > 5 else {}),
            **(class_metrics(found) if "class_rows" in found else {}),
            "loss": float(found["loss"]) / max(1, examples),
            "num_examples": examples,
        }

    def summaries(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the most probable class of each image, with its probability."""
        return _classes.best(examples["probability"], self._names())

    def result_lines(self, examples: Mapping[str, np.ndarray], top: int) -> list[list[str]]:
        """Returns the `top` most probable classes of each image, most probable first."""
        return _classes.ranking(examples["probability"], self._names(), top)

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns `probability` `[b, classes]`, by softmax or sigmoid as in training."""
        logits = self.logits(params, batch)
        squash = jax.nn.softmax if self.loss == "softmax" else jax.nn.sigmoid
        return {"probability": squash(logits)}

    def sections(self, examples: Mapping[str, np.ndarray]) -> list[Section]:
        """Returns sections with the confusion matrix, the reliability diagram, and worst mistakes.

        There is no matrix of more than 100 classes. Images without one of the classes as their
        label are left out. Those whose probabilities are not finite are counted as misclassified,
        and not drawn.
        """
        from vit_jax.report import figures, numbers  # matplotlib, which training can do without

        names = self._names()
        if examples["label"].ndim > 1:
            return []
        is_class = (examples["label"] >= 0) & (examples["label"] < len(names))
        drawn = is_class & np.isfinite(examples["probability"]).all(-1)
        images, labels, probability = (
            examples[name][drawn] for name in ("image", "label", "probability")
        )
        predicted = probability.argmax(-1)
        sections = []
        if len(names) <= 100:
            matrix = np.zeros((len(names), len(names)), np.int64)
            np.add.at(matrix, (labels, predicted), 1)
            sections.append(
                Section(
                    "Confusion matrix",
                    "Rows are the true classes, columns the predicted ones.",
                    figures.confusion_matrix(matrix, names),
                    alt=numbers.confusions_in_words(matrix, names),
                    numbers=numbers.confusions(matrix, names),
                )
            )
        if len(labels):
            sections.append(_reliability(predicted == labels, probability.max(-1)))
        count = int(is_class.sum())
        wrong = count - int((predicted == labels).sum())
        text = f"{wrong} of {count} images are misclassified."
        if lost := count - len(labels):
            text += f" The probabilities of {lost} of them are not finite."
        hardest = figures.hardest_mistakes(images, labels, probability, names, HARDEST)
        if hardest:
            text += " These are the ones whose true class got the least probability."
        alt = "Misclassified images, each with its predicted class above its true class."
        return [*sections, Section("The hardest mistakes", text, hardest, alt=alt)]

    def _names(self) -> tuple[str, ...]:
        return self.info.class_names or tuple(map(str, range(self.info.num_classes)))


def _reliability(is_right: np.ndarray, confidence: np.ndarray) -> Section:
    """Returns the section with the reliability diagram of images `[n]`."""
    from vit_jax.report import figures, numbers

    found = Reliability.of(is_right, confidence)
    text = (
        "The confidence is the probability of the predicted class. A bar is the share of the images"
        " with about the same confidence that is classified correctly. The bars of a model that is"
        " well calibrated end at the dashed line, and those of an overconfident model end below it."
        " The mean distance from the line, which is the calibration error (ECE), is"
        f" {found.error:.1%} for these {len(confidence):,} images."
    )
    figure = figures.reliability_diagram(found.rows, found.accuracy)
    return Section(
        "Reliability diagram",
        text,
        figure,
        alt="Bars of the accuracy by confidence, above bars of the number of images.",
        numbers=numbers.reliability(found.rows, found.accuracy),
    )
