"""How well vectors find each other: texts to images and images to texts."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vit_jax.data.tokenizer import NO_TEXT

CUTOFFS = (1, 5, 10)

_ROWS_AT_ONCE = 1024


class Split(NamedTuple):
    """A split's images and its texts, each text once.

    images: `[n, dim]`. texts: `[m, dim]`, in the order in which they first occur.
    own: for each image the numbers of its texts, int `[n, k]`; -1 where it has fewer.
    """

    images: np.ndarray
    texts: np.ndarray
    own: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, texts: np.ndarray, tokens: np.ndarray) -> "Split":
        """From texts `[n, k, dim]` and their tokens `[n, k, length]`."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        real = flat[:, 0] != NO_TEXT
        _, first, number = np.unique(flat[real], axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        own = np.full(len(flat), -1)
        own[real] = place[number.ravel()]
        vectors = texts.reshape(len(flat), -1)[real][first[order]]
        return cls(images, vectors, own.reshape(tokens.shape[:-1]))


def recalls(split: Split) -> Mapping[str, float]:
    """Recall at 1, 5 and 10 in both directions, as shares.

    An image is found right if one of its own texts is among the best; a text, if one of the images
    that have it is. Equals of the right one count as better, so that a constant finds nothing.
    """
    n, m = len(split.images), len(split.texts)
    is_own = np.zeros((n, m), bool)
    rows, columns = np.nonzero(split.own >= 0)
    is_own[rows, split.own[rows, columns]] = True
    ranks = {
        "image_to_text": _ranks(split.images, split.texts, is_own),
        "text_to_image": _ranks(split.texts, split.images, is_own.T),
    }
    return {
        f"{direction}_recall{cutoff}": float((found < cutoff).mean())
        for direction, found in ranks.items()
        for cutoff in CUTOFFS
    }


def _ranks(queries: np.ndarray, keys: np.ndarray, is_own: np.ndarray) -> np.ndarray:
    """How many wrong keys are at least as near as the nearest right one; queries with one."""
    ranks = []
    for first in range(0, len(queries), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        scores, right = queries[part] @ keys.T, is_own[part]
        best = np.where(right, scores, -np.inf).max(1, keepdims=True)
        ranks.append(((scores >= best) & ~right).sum(1)[right.any(1)])
    return np.concatenate(ranks)


def right_among(split: Split, count: int) -> float | None:
    """Share of the images whose first text is nearer than `count - 1` others; None if too few.

    The others are the first texts of the images that follow in the split, and after its end of
    those at its start: different ones, and none of the image's own.
    """
    if len(np.unique(split.own[:, 0])) < count + split.own.shape[1]:
        return None
    n, right = len(split.images), 0
    for image in range(n):
        own = set(split.own[image].tolist())
        others: dict[int, None] = {}
        following = image
        while len(others) < count - 1:
            following = (following + 1) % n
            text = int(split.own[following, 0])
            if text not in own:
                others[text] = None
        scores = split.texts[[int(split.own[image, 0]), *others]] @ split.images[image]
        right += bool((scores[1:] < scores[0]).all())
    return right / n
