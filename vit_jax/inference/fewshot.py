"""Evaluates frozen features by few-shot and linear least squares and by nearest neighbors.

Nothing is trained. The module computes a model's features of a training and a test split;
`ridge` and `neighbors` of `vit_jax.training` have the measures, which `config.eval.probes` gives
during training.
"""

import logging
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from vit_jax import data, tasks
from vit_jax.errors import UserError
from vit_jax.inference.features import Embedder, backbone_params
from vit_jax.training.class_names import check_labels
from vit_jax.training.evaluate import open_split
from vit_jax.training.learned import warn_of_other_statistics
from vit_jax.training.neighbors import NEIGHBORS, Labelled, accuracy, neighbor_votes
from vit_jax.training.ridge import (
    L2_REGS,
    SEEDS,
    SHOTS,
    draw_shots,
    few_shot,
    least_squares,
)
from vit_jax.training.run import open_source
from vit_jax.types import DataInfo

__all__ = [
    "L2_REGS",
    "SEEDS",
    "SHOTS",
    "accuracy",
    "draw_shots",
    "few_shot",
    "least_squares",
    "run",
]


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
      UserError: there is no checkpoint, images do not have exactly one label each, or labels mean
        other classes in the two sets.
    """
    if not config.init.checkpoint:
        raise UserError("config.init.checkpoint is empty; write whose features to measure")
    split = open_split(config, next(iter(config.eval.sets)))
    source = open_source(config.data)
    check_labels(f"config.eval.sets.{split.name}", split.source, "config.data", source)
    info = DataInfo(
        data.element_spec(source, config.data.eval_pp), source.num_classes, source.class_names
    )
    task = tasks.build(config.task, config.model, info)
    warn_of_other_statistics(task, config.init.checkpoint)
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
