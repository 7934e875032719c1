"""Contrastive losses over all pairs of a batch, in chunks of the matrix of logits.

The rows of the matrix (images) are split over the devices as the batch is. Its columns (texts) are
computed `chunk` at a time, the same ones on every device. So a device holds all text vectors, which
are small, and `rows / devices × chunk` logits; the backward pass computes the logits again.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import TowerOutputs
from vit_jax.types import Array


def softmax_loss(pairs: TowerOutputs, chunk: int) -> Array:
    """Returns the mean cross-entropy of both directions, summed over pairs (CLIP, figure 3)."""

    def block(carry: Array, texts: Array, first: Array) -> tuple[Array, Array]:
        del first
        logits = _logits(pairs, texts)
        rows = jnp.logaddexp(carry, jax.nn.logsumexp(logits, axis=1))
        return rows, jax.nn.logsumexp(logits, axis=0)

    assert pairs.image is not None
    assert pairs.text is not None
    start = jnp.full(len(pairs.image), -jnp.inf)
    of_images, of_texts = _over_chunks(block, start, pairs.text, chunk)
    own = pairs.scale * (pairs.image * pairs.text).sum(-1) + pairs.bias
    return ((of_images - own) + (of_texts.reshape(-1) - own)).sum() / 2


def sigmoid_loss(pairs: TowerOutputs, chunk: int) -> Array:
    """Returns the summed binary cross-entropy of all pairs (Zhai et al. 2023, SigLIP, eq. 1)."""
    assert pairs.image is not None
    assert pairs.text is not None
    rows = jnp.arange(len(pairs.image))[:, None]

    def block(carry: Array, texts: Array, first: Array) -> tuple[Array, None]:
        right = rows == first + jnp.arange(len(texts))[None]
        logits = _logits(pairs, texts)
        return carry - jax.nn.log_sigmoid(jnp.where(right, logits, -logits)).sum(), None

    return _over_chunks(block, jnp.float32(0), pairs.text, chunk)[0]


def _logits(pairs: TowerOutputs, texts: Array) -> Array:
    """Returns logits `[batch, texts]`, whose rows are on the devices of their images."""
    images = nn.with_logical_constraint(pairs.image, ("batch", None))
    return nn.with_logical_constraint(pairs.logits(images, texts), ("batch", None))


def _over_chunks(block: Callable, start: Array, texts: Array, chunk: int) -> tuple:
    """Returns the `jax.lax.scan` of `block(carry, texts, number of the first)` over all texts.

    Chunks have the largest size up to `chunk` that leaves no remainder.
    """
    count = len(texts)
    size = next(size for size in range(min(chunk, count), 0, -1) if count % size == 0)
    texts = nn.with_logical_constraint(texts, (None, None))
    parts = texts.reshape(count // size, size, -1), jnp.arange(0, count, size)
    return jax.lax.scan(jax.checkpoint(lambda carry, part: block(carry, *part)), start, parts)
