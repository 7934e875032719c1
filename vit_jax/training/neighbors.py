"""Weighted nearest neighbors on frozen features, as DINO and DINOv2 measure them.

The nearest neighbors vote as in Wu et al. 2018 ("Unsupervised feature learning via non-parametric
instance discrimination", section 3.4) and Caron et al. 2021 (DINO, section 4.1).
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from vit_jax.errors import UserError

NEIGHBORS = (10, 20, 100, 200)
"""The numbers of neighbors that DINO and DINOv2 try; both report the best, which is mostly 20."""
TEMPERATURE = 0.07

# The number of similarities computed at a time, so that ImageNet fits into memory.
_SIMILARITIES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Features float32 `[n, dim]` of a split, and its labels int `[n]`.

    Raises:
      UserError: a label is negative, as that of an image without a class.
    """

    features: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.labels.ndim == 1 and len(self.labels) and self.labels.min() < 0:
            raise UserError(
                f"an image has the label {self.labels.min()}: probes compare images with one class"
                " each, from 0 on"
            )


def neighbor_votes(
    train: Labelled,
    features: np.ndarray,
    num_classes: int,
    *,
    counts: Sequence[int] = NEIGHBORS,
    temperature: float = TEMPERATURE,
    shares: bool = False,
) -> dict[int, np.ndarray]:
    """Returns the votes float64 `[n, classes]` of the nearest training features, for each count.

    The weight of each vote is exp(cosine / temperature). Counts above the number of training
    features use all of them.

    Args:
      features: `[n, dim]`, of any length; they are normalized here, as those of `train` are.
      shares: divide the weights by the sum over the largest count's neighbors, as DINOv2 does; the
        order of classes is the same.
    """
    votes = {count: np.zeros((len(features), num_classes)) for count in counts}
    for rows, cosines, labels in _nearest(train, features, max(counts)):
        weights = np.exp(cosines.astype(np.float64) / temperature)
        if shares:
            weights /= weights.sum(axis=1, keepdims=True)
        for count, found in votes.items():
            np.add.at(found, (rows[:, None], labels[:, :count]), weights[:, :count])
    return votes


def _nearest(
    train: Labelled, features: np.ndarray, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (row numbers, cosines, labels) of the nearest training features, nearest first."""
    known, unknown = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        for x in (train.features, features)
    )
    count = min(count, len(known))
    chunk = max(1, _SIMILARITIES // len(known))
    for start in range(0, len(unknown), chunk):
        cosines = unknown[start : start + chunk] @ known.T
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        similar = np.take_along_axis(cosines, nearest, axis=1)
        order = np.argsort(-similar, axis=1, kind="stable")
        nearest, similar = (np.take_along_axis(x, order, axis=1) for x in (nearest, similar))
        yield start + np.arange(len(cosines)), similar, train.labels[nearest]


def accuracy(scores: np.ndarray, labels: np.ndarray, top: int = 1) -> float:
    """Returns the fraction of rows whose label is among the `top` highest scores.

    Of classes with equal scores the first ones count as higher. A row with a score that is not
    finite counts as wrong.
    """
    finite = np.isfinite(scores).all(axis=1)
    if top == 1:
        return float(((scores.argmax(axis=1) == labels) & finite).mean())
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return float(((best == labels[:, None]).any(axis=1) & finite).mean())
