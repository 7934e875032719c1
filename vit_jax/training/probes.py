"""Measures of frozen features that need no training: nearest neighbors and least squares.

`config.eval.probes` has them at every evaluation, `fewshot` after training.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.training.neighbors import Labelled, accuracy, neighbor_votes
from vit_jax.training.ridge import few_shot, least_squares


def measure(
    train: Labelled, test: Labelled, num_classes: int, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Returns the accuracies on `test` of classifiers that know the features of `train`.

    Args:
      settings: `config.eval.probes`, complete.

    Returns:
      `knn_K` of K weighted nearest neighbors; `fewshot_N` of N examples per class, the mean of
      three draws, for each N that all classes have; `linear` by all examples.
    """
    l2 = settings["l2"]
    counts = settings["neighbors"]
    votes = neighbor_votes(train, test.features, num_classes, counts=counts) if counts else {}
    found = {f"knn_{count}": accuracy(scores, test.labels) for count, scores in votes.items()}
    least = int(np.bincount(train.labels, minlength=num_classes).min())
    shots = [count for count in settings["shots"] if count <= least]
    few = few_shot(train, test, num_classes, shots=shots, l2_regs=[l2])
    found |= {name.partition("/")[0]: value for name, value in few.items()}
    if settings["linear"]:
        scores = least_squares(train, test.features, num_classes, [l2])[l2]
        found["linear"] = accuracy(scores, test.labels)
    return found
