"""Evaluates frozen features by few-shot and linear least squares and by nearest neighbors.

Nothing is trained. The module computes a model's features of a training and a test split, and
solves closed forms in float64.

Few-shot accuracy by regularized least squares is the measure of Dosovitskiy et al. 2021 (section
4.1). The results equal those of big_vision's evaluator (same examples for a seed, same scaling).
`vit_jax.inference.neighbors` has the nearest neighbors.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from vit_jax import data, tasks
from vit_jax.errors import UserError
from vit_jax.inference.features import Embedder, backbone_params
from vit_jax.inference.neighbors import NEIGHBORS, Labelled, accuracy, neighbor_votes
from vit_jax.training.evaluate import open_split
from vit_jax.training.run import open_source
from vit_jax.types import DataInfo

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
L2_REGS = (2.0**5, 2.0**10, 2.0**13)

_BIAS = 100.0
"""The constant feature; large, so that regularising its weight hardly binds the bias."""
_EPSILON = 1e-5

# The number of examples processed at a time, so that ImageNet fits into memory.
_CHUNK = 1 << 14


def run(
    config: ConfigDict,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    l2_regs: Sequence[float] = L2_REGS,
) -> dict[str, float]:
    """Returns accuracies of the features of `config.init.checkpoint` on the config's data.

    The training examples are those of `config.data`, preprocessed by `eval_pp`. The test examples
    are all those of the first set of `config.eval.sets`. The head is not used.

    Returns:
      `SETNAME/fewshot_N/l2_R` for each number of examples per class that all classes have, averaged
      over the seeds;
      `SETNAME/linear/l2_R` for all examples; `SETNAME/knn_K` for K nearest neighbors, and
      `SETNAME/knn`, that of 20.

    Raises:
      UserError: there is no checkpoint, or images do not have exactly one label each.
    """
    if not config.init.checkpoint:
        raise UserError("config.init.checkpoint is empty; write whose features to measure")
    split = open_split(config, next(iter(config.eval.sets)))
    source = open_source(config.data)
    info = DataInfo(
        data.element_spec(source, config.data.eval_pp), source.num_classes, source.class_names
    )
    task = tasks.build(config.task, config.model, info)
    params = backbone_params(task, config.init.checkpoint, config.init.interpolation)
    embed = Embedder(task, params)
    train = _features(embed, source, config.data.eval_pp, config)
    test = _features(embed, split.source, split.pp, config)
    classes = source.num_classes
    least = int(np.bincount(train.labels, minlength=classes).min())
    if max(shots) > least:
        logging.warning("the smallest class has %d examples: no more shots than that", least)
    shots = [count for count in shots if count <= least]
    found = few_shot(train, test, classes, shots=shots, seeds=seeds, l2_regs=l2_regs)
    found |= {
        f"linear/l2_{l2:g}": accuracy(scores, test.labels)
        for l2, scores in least_squares(train, test.features, classes, l2_regs).items()
    }
    for count, votes in neighbor_votes(train, test.features, classes, counts=NEIGHBORS).items():
        found[f"knn_{count}"] = accuracy(votes, test.labels)
    found["knn"] = found["knn_20"]
    return {f"{split.name}/{name}": value for name, value in found.items()}


def _features(embed: Embedder, source: data.Source, pp: str, config: ConfigDict) -> Labelled:
    size = config.eval.batch_size or config.batch_size
    features, labels = [], []
    with data.eval_batches(
        source, batch_size=size, rows=np.arange(size), pp=pp, num_threads=config.data.threads
    ) as batches:
        for batch in batches:
            real = batch["mask"] > 0
            features.append(embed(batch["image"])[real])
            labels.append(batch["label"][real])
    found = Labelled(np.concatenate(features), np.concatenate(labels))
    if found.labels.ndim != 1:
        raise UserError(f"{source.fingerprint}: few-shot learning wants one label an image")
    return found


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
    the smaller of the two Gram matrices, is used for all strengths.
    """
    mean, deviation = train.features.mean(axis=0), train.features.std(axis=0) + _EPSILON

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
