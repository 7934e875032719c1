"""Texts about images whose classes have probabilities."""

from collections.abc import Sequence

import numpy as np

from vit_jax.tracking.plain_text import one_line


def best(probability: np.ndarray, names: Sequence[str]) -> list[str]:
    """Returns the most probable class of each row of `[n, classes]`, with its probability."""
    return [f"{one_line(names[row.argmax()])} {row.max():.0%}" for row in probability]


def ranking(probability: np.ndarray, names: Sequence[str], top: int) -> list[list[str]]:
    """Returns a line for each of the `top` most probable classes of each row, in their order."""
    found = []
    for row in probability:
        order = np.argsort(-row, kind="stable")[:top]
        found.append([f"{row[i]:7.2%}  {one_line(names[i])}" for i in order])
    return found
