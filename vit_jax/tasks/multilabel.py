"""Classification of images that may have several labels, or none.

    config.task = {"name": "multilabel"}

An example has an `image` and a `label`: ones and zeros `[classes]`, as the sources `table` and
`tfds` read lists of labels.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.tasks import classification
from vit_jax.tasks._checks import check_share
from vit_jax.tasks._class_metrics import average_precision, f1_scores
from vit_jax.tracking.metrics import COUNT, LOSS, SCORE, Metric
from vit_jax.tracking.plain_text import distinct
from vit_jax.types import Array, Batch, Params

MOST_CLASSES = 100
"""The number of classes up to which each has a metric of its own."""


@dataclasses.dataclass(frozen=True)
class Task(classification.Task):
    """Classification in which every class is a question of its own.

    The fields are those of `classification`, except that the loss is the binary cross-entropy.

    Attributes:
      threshold: the probability from which an answer is a yes, for the F1 scores; or one for each
        class.
    """

    loss: str = "sigmoid"
    threshold: float | tuple[float, ...] = 0.5

    headline = "mean_ap"
    of_evaluation: ClassVar[tuple[str, ...]] = ("threshold",)
    metric_info: ClassVar[Mapping[str, Metric]] = {
        "mean_ap": SCORE,
        "f1_micro": SCORE,
        "f1_macro": SCORE,
        "ap/*": SCORE,
        "loss": LOSS,
        "num_examples": COUNT,
    }

    def _check_fields(self) -> None:
        if self.loss != "sigmoid":
            raise UserError(f"config.task.loss={self.loss!r}: task multilabel has sigmoid")
        thresholds = np.atleast_1d(self.threshold).tolist()
        for one in thresholds:
            check_share(threshold=one)
        if len(thresholds) not in (1, self.info.num_classes):
            raise UserError(
                f"config.task.threshold has {len(thresholds)} numbers; write one, or one for each"
                f" of the {self.info.num_classes} classes"
            )
        super()._check_fields()

    def _check_data(self) -> None:
        super()._check_data()
        if not self.info.spec["label"].shape:
            raise UserError(
                "task multilabel: the data has one label an image; write"
                " config.task.name='classification', or a source that reads lists of labels"
            )

    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the number of real rows and the sum of their losses."""
        real = batch["mask"] > 0
        labels = self._dense_labels(batch["label"])
        losses = classification.LOSSES["sigmoid"](self.logits(params, batch), labels)
        return {
            "examples": real.sum(dtype=jnp.int32),
            "loss": jnp.where(real, losses, 0).sum(),
        }

    def eval_rows(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns `score` float32 and `labels` uint8, both `[b, classes]`."""
        score = jax.nn.sigmoid(self.logits(params, batch).astype(jnp.float32))
        return {"score": score, "labels": (batch["label"] > 0).astype(jnp.uint8)}

    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns `mean_ap`, `f1_micro`, `f1_macro`, `ap/CLASS`, mean `loss` and `num_examples`.

        Means are over the classes that some example of the split has.
        """
        examples = int(found["examples"])
        precision = average_precision(found["labels"], found["score"])
        there = np.flatnonzero(~np.isnan(precision))
        micro, macro = f1_scores(
            found["labels"], found["score"] >= np.asarray(self.threshold, np.float32)
        )
        by_class = {}
        if len(precision) <= MOST_CLASSES:
            names = distinct(self._names())
            by_class = {f"ap/{names[i]}": float(precision[i]) for i in there}
        return {
            "mean_ap": float(precision[there].mean()) if len(there) else 0.0,
            "f1_micro": micro,
            "f1_macro": macro,
            **by_class,
            "loss": float(found["loss"]) / max(1, examples),
            "num_examples": examples,
        }
