"""Retrieval metrics: recalls of the texts of images, and of the images of texts."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vit_jax.data.tokenizer import NO_TEXT

CUTOFFS = (1, 5, 10)

_ROWS_AT_ONCE = 1024


class Split(NamedTuple):
    """The images and the texts of a split, each text once.

    Attributes:
      images: `[n, dim]`.
      texts: `[m, dim]`, in the order in which they first occur.
      own: for each image the numbers of its texts, int `[n, k]`; -1, at the end, where an image has
        fewer than k.
    """

    images: np.ndarray
    texts: np.ndarray
    own: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, texts: np.ndarray, tokens: np.ndarray) -> "Split":
        """Returns the split with texts `[n, k, dim]` whose tokens are `[n, k, length]`."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        real = flat[:, 0] != NO_TEXT
        _, first, number = np.unique(flat[real], axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        numbers = np.full(len(flat), -1)
        numbers[real] = place[number.ravel()]
        vectors = texts.reshape(-1, texts.shape[-1])[real][first[order]]
        own: np.ndarray = numbers.reshape(tokens.shape[:-1])
        own = np.take_along_axis(own, np.argsort(own < 0, axis=1, kind="stable"), axis=1)
        return cls(images, vectors, own)


def recalls(split: Split) -> Mapping[str, float]:
    """Returns recall at 1, 5 and 10 in both directions, as shares; {} for a split without texts.

    An image counts as found if one of its own texts is among the best; a text, if one of the images
    that have it is. An image without a text counts in neither direction as a query. Ties count
    against the right one, and so do scores that are not numbers: a constant finds nothing.
    """
    if not len(split.texts):
        return {}
    rows, columns = np.nonzero(split.own >= 0)
    pairs = np.stack([rows, split.own[rows, columns]])
    ranks = {
        "image_to_text": _ranks(split.images, split.texts, pairs),
        "text_to_image": _ranks(split.texts, split.images, pairs[::-1]),
    }
    return {
        f"{direction}_recall{cutoff}": float((found < cutoff).mean())
        for direction, found in ranks.items()
        for cutoff in CUTOFFS
    }


def _ranks(queries: np.ndarray, keys: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns for each query the number of wrong keys at least as near as the nearest right key.

    Queries without a right key are left out.

    pairs: the numbers of the queries and of the keys that belong together, int `[2, pairs]`.
    """
    ranks = []
    query, key = pairs[:, np.argsort(pairs[0], kind="stable")]
    for first in range(0, len(queries), _ROWS_AT_ONCE):
        scores = queries[first : first + _ROWS_AT_ONCE] @ keys.T
        # A table of all queries and keys would take gigabytes for a large split.
        mine = slice(*np.searchsorted(query, [first, first + len(scores)]))
        right = np.zeros(scores.shape, bool)
        right[query[mine] - first, key[mine]] = True
        best = np.where(right, scores, -np.inf).max(1, keepdims=True)
        ranks.append((~(scores < best) & ~right).sum(1)[right.any(1)])
    return np.concatenate(ranks)


def right_among(split: Split, count: int) -> float | None:
    """Returns the share of the images whose first text is nearer than `count - 1` others.

    The others are the first texts of the images that follow in the split, and after its end of
    those at its start: different ones, and none of the image's own. Images without a text are left
    out. Returns None for a split with too few texts.
    """
    rows = np.flatnonzero(split.own[:, 0] >= 0)
    images, own_texts = split.images[rows], split.own[rows]
    if len(np.unique(own_texts[:, 0])) < count + own_texts.shape[1]:
        return None
    right = 0
    for number, image in enumerate(images):
        own = set(own_texts[number].tolist())
        others: dict[int, None] = {}
        following = number
        while len(others) < count - 1:
            following = (following + 1) % len(images)
            text = int(own_texts[following, 0])
            if text not in own:
                others[text] = None
        scores = split.texts[[int(own_texts[number, 0]), *others]] @ image
        right += bool((scores[1:] < scores[0]).all())
    return right / len(images)
