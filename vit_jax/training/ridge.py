"""Classifiers by regularized least squares on frozen features, in closed form and in float64.

Few-shot accuracy is the measure of Dosovitskiy et al. 2021 (section 4.1). The results equal those
of big_vision's evaluator (same examples for a seed, same scaling).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from vit_jax.errors import UserError
from vit_jax.training.neighbors import Labelled, accuracy

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
L2_REGS = (2.0**5, 2.0**10, 2.0**13)

_BIAS = 100.0
"""The constant feature; large, so that regularizing its weight hardly binds the bias."""
_EPSILON = 1e-5

# The number of examples processed at a time, so that ImageNet fits into memory.
_CHUNK = 1 << 14


def few_shot(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    l2_regs: Sequence[float] = L2_REGS,
) -> dict[str, float]:
    """Returns test accuracies `fewshot_N/l2_R` of N examples per class, averaged over the seeds."""
    sums: dict[str, float] = {}
    for count in shots:
        for seed in seeds:
            chosen = draw_shots(train.labels, num_classes, count, seed)
            few = Labelled(train.features[chosen], train.labels[chosen])
            for l2, scores in least_squares(few, test.features, num_classes, l2_regs).items():
                name = f"fewshot_{count}/l2_{l2:g}"
                sums[name] = sums.get(name, 0.0) + accuracy(scores, test.labels)
    return {name: total / len(seeds) for name, total in sums.items()}


def draw_shots(labels: np.ndarray, num_classes: int, count: int, seed: int) -> np.ndarray:
    """Returns the row numbers of `count` random examples of each class, in the order of classes.

    Raises:
      UserError: a class has fewer examples.
    """
    random = np.random.default_rng(seed)
    chosen = []
    for label in range(num_classes):
        rows = np.flatnonzero(labels == label)
        if len(rows) < count:
            raise UserError(f"{count} examples a class are wanted; class {label} has {len(rows)}")
        chosen.append(random.permutation(rows)[:count])
    return np.concatenate(chosen)


def least_squares(
    train: Labelled, features: np.ndarray, num_classes: int, l2_regs: Sequence[float]
) -> Mapping[float, np.ndarray]:
    """Returns scores float64 `[n, classes]` of `features` by ridge regression, for each strength.

    Features are standardized by the training mean and deviation, and a constant is appended. The
    regression target is +1 for the label and -1 for the other classes. One eigendecomposition, of
    the smaller of the two Gram matrices, is used for all strengths. Scores are NaN if the training
    features are not finite or too large, as those of a run that diverges are.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        mean, deviation = train.features.mean(axis=0), train.features.std(axis=0) + _EPSILON
    if not np.isfinite([mean, deviation]).all():
        return {l2: np.full((len(features), num_classes), np.nan) for l2 in l2_regs}

    def prepared(x: np.ndarray) -> np.ndarray:
        scaled = (np.asarray(x, np.float64) - mean) / deviation
        return np.pad(scaled, [(0, 0), (0, 1)], constant_values=_BIAS)

    def targets(labels: np.ndarray) -> np.ndarray:
        return 2.0 * np.eye(num_classes)[labels] - 1.0

    queries = prepared(features)
    if len(train.features) <= train.features.shape[1]:
        x = prepared(train.features)
        values, vectors = np.linalg.eigh(x @ x.T)
        projected, queries = vectors.T @ targets(train.labels), queries @ (x.T @ vectors)
    else:
        gram, cross = 0.0, 0.0
        for start in range(0, len(train.labels), _CHUNK):
            rows = slice(start, start + _CHUNK)
            x = prepared(train.features[rows])
            gram, cross = gram + x.T @ x, cross + x.T @ targets(train.labels[rows])
        values, vectors = np.linalg.eigh(gram)
        projected, queries = vectors.T @ cross, queries @ vectors
    return {l2: queries @ (projected / (values + l2)[:, None]) for l2 in l2_regs}
