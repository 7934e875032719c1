"""Measures of frozen features that need no training: nearest neighbors and least squares.

`config.eval.probes` has them at every evaluation, `fewshot` after training.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.training.neighbors import Labelled, accuracy, neighbor_votes
from vit_jax.training.ridge import few_shot, least_squares


def possible(
    train: Labelled,
    num_classes: int,
    settings: Mapping[str, Any],
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Returns settings without the `shots` for which a class has too few examples, and warns.

    Args:
      settings: `config.eval.probes`, complete.
      names: those of the classes, if they are known.
    """
    counts = np.bincount(train.labels, minlength=num_classes)
    smallest = int(counts.argmin())
    few = [count for count in settings["shots"] if count > counts[smallest]]
    if few:
        logging.warning(
            "config.eval.probes.shots: %s left out, because class %s has only %d of the images that"
            " the probes know",
            ", ".join(map(str, few)),
            repr(names[smallest]) if names else smallest,
            counts[smallest],
        )
    return {**settings, "shots": [count for count in settings["shots"] if count not in few]}


def measure(
    train: Labelled, test: Labelled, num_classes: int, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Returns the accuracies on `test` of classifiers that know the features of `train`.

    Args:
      settings: `config.eval.probes`, complete, of which all classes have the `shots`; see
        `possible`.

    Returns:
      `knn_K` of K weighted nearest neighbors; `fewshot_N` of N examples per class, the mean of
      three draws; `linear` by all examples.
    """
    l2 = settings["l2"]
    counts = settings["neighbors"]
    votes = neighbor_votes(train, test.features, num_classes, counts=counts) if counts else {}
    found = {f"knn_{count}": accuracy(scores, test.labels) for count, scores in votes.items()}
    few = few_shot(train, test, num_classes, shots=settings["shots"], l2_regs=[l2])
    found |= {name.partition("/")[0]: value for name, value in few.items()}
    if settings["linear"]:
        scores = least_squares(train, test.features, num_classes, [l2])[l2]
        found["linear"] = accuracy(scores, test.labels)
    return found
