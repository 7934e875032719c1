"""Metrics that count every class alike, and the calibration of probabilities."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.types import Array

MOST_CLASSES = 100
"""The number of classes up to which each class has a metric of its own."""

BINS = 15
"""The number of bins of the calibration error, as in Guo et al. 2017."""

# A probability at the edge of a bin, such as that of 1 of 3 classes before training, must not
# change its bin with the rounding of the last bit.
_EDGE = 1e-4


def top_classes(scores: Array, count: int) -> Array:
    """Returns the classes of the highest scores `[b, classes]`, best first, int32 `[b, count]`.

    They are -1, which is no class, in a row with a score that is not finite.
    """
    top = jax.lax.top_k(scores, count)[1]
    return jnp.where(jnp.isfinite(scores).all(-1, keepdims=True), top, -1)


def class_sums(
    labels: Array, predicted: Array, confidence: Array, scored: Array, classes: int
) -> dict[str, Array]:
    """Returns additive counts of a batch, by class and by bin of confidence.

    Args:
      labels, predicted: class numbers, integers `[b]`; -1 for no class.
      confidence: the probability of the predicted class, float32 `[b]`.
      scored: whether a row counts, bool `[b]`.
      classes: the number of classes.
    """
    right = scored & (labels == predicted)
    bins = _bins(confidence)

    def count(numbers: Array, rows: Array, size: int) -> Array:
        return (jax.nn.one_hot(numbers, size, dtype=jnp.int32) * rows[:, None]).sum(0)

    in_bin = jax.nn.one_hot(bins, BINS, dtype=jnp.float32) * scored[:, None]
    return {
        "class_rows": count(labels, scored, classes),
        "class_answers": count(predicted, scored, classes),
        "class_hits": count(labels, right, classes),
        "bin_hits": count(bins, right, BINS),
        "bin_confidence": (in_bin * confidence[:, None]).sum(0),
    }


def _bins(confidence: Array) -> Array:
    """Returns the number of the bin of each confidence, int32 `[b]`."""
    return jnp.clip(jnp.ceil(confidence * BINS - _EDGE).astype(jnp.int32) - 1, 0, BINS - 1)


class Reliability(NamedTuple):
    """Sums over the examples in each bin of confidence, each float64 `[BINS]`.

    rows: the number of examples. hits: of right answers. confidence: the sum of confidences.
    """

    rows: np.ndarray
    hits: np.ndarray
    confidence: np.ndarray

    @classmethod
    def of(cls, is_right: np.ndarray, confidence: np.ndarray) -> "Reliability":
        """Returns what the bins of the metric `ece` hold, for examples `[n]`."""
        bins = np.asarray(_bins(jnp.asarray(confidence)))
        return cls(
            *(np.bincount(bins, x, BINS) for x in (np.ones(len(bins)), is_right, confidence))
        )

    @property
    def accuracy(self) -> np.ndarray:
        """The share of right answers in each bin, NaN in an empty one."""
        with np.errstate(invalid="ignore"):
            return self.hits / self.rows

    @property
    def error(self) -> float:
        """The expected calibration error, as `class_metrics` computes it."""
        return calibration_error(self.hits, self.confidence, self.rows.sum())


def calibration_error(hits: np.ndarray, confidence: np.ndarray, count: float) -> float:
    """Returns the expected calibration error (Guo et al. 2017, equation 3) of `count` examples.

    hits, confidence: the number of right answers and the sum of confidences in each bin.
    """
    return float(np.abs(hits - confidence.astype(np.float64)).sum() / max(1, count))


def class_metrics(found: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """Returns `balanced_accuracy`, `f1` and `ece` from the sums of `class_sums` over a split.

    `balanced_accuracy` is the mean recall of the classes that the split has, `f1` the mean of their
    F1 scores. `ece` is the expected calibration error (Guo et al. 2017, equation 3): by how much
    the confidence differs from the accuracy. Up to `MOST_CLASSES` classes also have their own
    recall, as `accuracy/CLASS`.

    Args:
      names: the names of the classes, all different.
    """
    rows = found["class_rows"].astype(np.float64)
    there = rows > 0
    if not there.any():
        return {"balanced_accuracy": 0.0, "f1": 0.0, "ece": 0.0}
    hits, answers = found["class_hits"][there], found["class_answers"][there]
    recalls = hits / rows[there]
    shown = np.flatnonzero(there).tolist() if len(names) <= MOST_CLASSES else []
    by_class = {
        f"accuracy/{names[number]}": float(recall)
        for number, recall in zip(shown, recalls, strict=False)
    }
    return {
        "balanced_accuracy": float(recalls.mean()),
        "f1": float((2 * hits / (rows[there] + answers)).mean()),
        "ece": calibration_error(found["bin_hits"], found["bin_confidence"], rows.sum()),
        **by_class,
    }


def average_precision(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the average precision of each class, float64 `[classes]`.

    It is the mean precision at the ranks of the right examples, where examples of equal scores
    share a rank, as in scikit-learn. NaN where no example has the class. An example whose score is
    not finite counts as wrong: it is never found if it has the class, and else ranks first.

    Args:
      labels: ones and zeros `[n, classes]`. scores: the higher the surer `[n, classes]`.
    """
    found = np.full(labels.shape[1], np.nan)
    finite = np.isfinite(scores)
    scores = np.where(finite, scores, np.where(labels > 0, -np.inf, np.inf))
    for label in np.flatnonzero((labels > 0).any(0)):
        order = np.argsort(-scores[:, label], kind="stable")
        ranked, has = scores[order, label], labels[order, label] > 0
        right = np.cumsum(has & finite[order, label])
        ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
        recall = right[ends] / has.sum()
        found[label] = (np.diff(recall, prepend=0) * right[ends] / (ends + 1)).sum()
    return found


def f1_scores(labels: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    """Returns the F1 score of all answers together (micro), and the mean of those of the classes.

    Args:
      labels, answers: `[n, classes]`; what is above 0 is a yes. Classes that no example has do not
        count in the mean.
    """
    labels, answers = labels > 0, answers > 0
    right = (labels & answers).sum(0)
    both = labels.sum(0) + answers.sum(0)
    there = labels.any(0)
    micro = 2 * right.sum() / max(1, both.sum())
    macro = (2 * right[there] / both[there]).mean() if there.any() else 0.0
    return float(micro), float(macro)
