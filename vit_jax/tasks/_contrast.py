"""Losses over all pairs of a batch, of which no device ever holds more than a few columns.

The rows of the matrix of logits (images) are split over the devices as the batch is; its columns
(texts) are taken `chunk` at a time, by every device the same. So a device holds all text vectors,
which are small, and `rows / devices × chunk` logits; the backward pass makes them once more.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import Compared
from vit_jax.types import Array


def softmax_loss(pairs: Compared, chunk: int) -> Array:
    """Mean of both directions' cross-entropies, summed over the pairs (CLIP, figure 3)."""

    def block(so_far: Array, texts: Array, first: Array) -> tuple[Array, Array]:
        del first
        logits = _logits(pairs, texts)
        rows = jnp.logaddexp(so_far, jax.nn.logsumexp(logits, axis=1))
        return rows, jax.nn.logsumexp(logits, axis=0)

    start = jnp.full(len(pairs.image), -jnp.inf)
    of_images, of_texts = _over_chunks(block, start, pairs.text, chunk)
    own = pairs.scale * (pairs.image * pairs.text).sum(-1) + pairs.bias
    return ((of_images - own) + (of_texts.reshape(-1) - own)).sum() / 2


def sigmoid_loss(pairs: Compared, chunk: int) -> Array:
    """Each pair on its own, right or wrong (Zhai et al. 2023, SigLIP, equation 1); summed."""
    rows = jnp.arange(len(pairs.image))[:, None]

    def block(so_far: Array, texts: Array, first: Array) -> tuple[Array, None]:
        right = rows == first + jnp.arange(len(texts))[None]
        logits = _logits(pairs, texts)
        return so_far - jax.nn.log_sigmoid(jnp.where(right, logits, -logits)).sum(), None

    return _over_chunks(block, jnp.float32(0), pairs.text, chunk)[0]


def _logits(pairs: Compared, texts: Array) -> Array:
    """`[batch, texts]`, rows where the images are."""
    images = nn.with_logical_constraint(pairs.image, ("batch", None))
    return nn.with_logical_constraint(pairs.logits(images, texts), ("batch", None))


def _over_chunks(block: Callable, start: Array, texts: Array, chunk: int) -> tuple:
    """`jax.lax.scan` of `block(so far, some texts, number of the first)` over all texts.

    The largest chunks of at most `chunk` that leave no rest are taken.
    """
    count = len(texts)
    size = next(size for size in range(min(chunk, count), 0, -1) if count % size == 0)
    texts = nn.with_logical_constraint(texts, (None, None))
    parts = texts.reshape(count // size, size, -1), jnp.arange(0, count, size)
    return jax.lax.scan(jax.checkpoint(lambda so_far, part: block(so_far, *part)), start, parts)
