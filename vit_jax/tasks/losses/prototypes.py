"""Self-distillation between distributions over prototypes: DINO, iBOT and DINOv2.

A teacher's logits become probabilities, by centering or by Sinkhorn-Knopp; the student's logits are
compared with them by cross-entropy. Logits are float32, `[..., K]` with K prototypes.
"""

import jax
import jax.numpy as jnp

from vit_jax.types import Array

STUDENT_TEMPERATURE = 0.1
CENTER_MOMENTUM = 0.9


def centered_probabilities(logits: Array, center: Array, temperature: Array | float) -> Array:
    """Returns softmax((logits - center) / temperature) (Caron et al. 2021, DINO, section 3.1).

    Args:
      logits: of the teacher, `[..., K]`.
      center: `[K]`, the average of the teacher's logits over the batches before this one.
      temperature: a scalar.
    """
    center = center.reshape((1,) * (logits.ndim - 1) + (-1,))
    return jax.nn.softmax((logits - center) / temperature, axis=-1)


def updated_center(
    center: Array,
    logits: Array,
    weights: Array | None = None,
    momentum: float = CENTER_MOMENTUM,
) -> Array:
    """Returns momentum · center + (1 - momentum) · mean of the logits (DINO, equation 4).

    The center `[K]` that a step uses is the one from before that step: call this at its end.

    Args:
      logits: of the teacher, `[..., K]`.
      weights: `[...]`, 1 for the rows that count and 0 for padding; None counts every row. With no
        row to count the center does not change.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    weights = jnp.ones(len(rows)) if weights is None else weights.reshape(-1).astype(jnp.float32)
    count = weights.sum()
    mean = jnp.einsum("n,nk->k", weights, rows, precision="highest") / jnp.maximum(count, 1.0)
    return jnp.where(count > 0, momentum * center + (1.0 - momentum) * mean, center)


def sinkhorn_probabilities(
    logits: Array,
    temperature: Array | float,
    weights: Array | None = None,
    iterations: int = 3,
) -> Array:
    """Returns probabilities `[N, K]` that use all prototypes equally, by Sinkhorn-Knopp.

    (Caron et al. 2020, SwAV, section 3.1; Ruan et al. 2023; Oquab et al. 2023, DINOv2, section 4.)

    exp(logits / temperature) is scaled so that all prototypes have the same sum, then so that all
    samples have, in turns. The samples' turn comes last, so every row sums to 1.

    Args:
      logits: of the teacher for all samples of the global batch, `[N, K]`.
      weights: `[N]`, 1 for samples and 0 for padding, whose rows are 0 in the result; None counts
        every row.
    """
    weights = jnp.ones(len(logits)) if weights is None else weights.astype(jnp.float32)
    scaled = jax.lax.stop_gradient(logits) / temperature
    valid = weights[:, None] > 0
    # A common factor cancels; with this one, the largest term is 1 and nothing overflows.
    largest = jnp.max(scaled, where=valid, initial=-jnp.inf)
    q = jnp.where(valid, jnp.exp(scaled - jnp.where(jnp.isfinite(largest), largest, 0.0)), 0.0)
    q = _divided(q, q.sum())
    count = jnp.maximum(weights.sum(), 1.0)
    for _ in range(iterations):
        q = _divided(q, q.sum(axis=0, keepdims=True)) / logits.shape[1]
        q = _divided(q, q.sum(axis=1, keepdims=True)) / count
    return q * count


def _divided(x: Array, by: Array) -> Array:
    """Returns x / by, or 0 where `by` is 0: a row of padding, a prototype without mass."""
    return jnp.where(by > 0, x / jnp.where(by > 0, by, 1.0), 0.0)


def crop_losses(
    student: Array,
    teacher: Array,
    *,
    temperature: float = STUDENT_TEMPERATURE,
    skip_same: bool = False,
) -> Array:
    """Returns each image's cross-entropy, summed over pairs of crops, float32 `[B]`.

    DINO's loss (Caron et al. 2021, equation 3) is the mean over images divided by the number of
    pairs, without the pairs of a crop with itself; DINOv2's is that of all pairs, whose weight its
    caller chooses.

    Args:
      student: logits `[S, B, K]`; crop i of the student is crop i of the teacher.
      teacher: probabilities `[T, B, K]`.
      temperature: of the student.
      skip_same: leave out the pairs (i, i).
    """
    log_p = jax.nn.log_softmax(student / temperature, axis=-1)
    target = jnp.broadcast_to(jax.lax.stop_gradient(teacher).sum(0), log_p.shape)
    if skip_same:
        both = min(len(student), len(teacher))
        target = target.at[:both].add(-teacher[:both])
    return -(jax.lax.stop_gradient(target) * log_p).sum((0, 2))


def num_pairs(student: int, teacher: int, *, skip_same: bool = False) -> int:
    """Returns the number of pairs of crops that `crop_losses` sums."""
    return student * teacher - (min(student, teacher) if skip_same else 0)


def cross_entropies(
    student: Array,
    teacher: Array,
    *,
    temperature: float = STUDENT_TEMPERATURE,
) -> Array:
    """Returns the cross-entropy of each row of logits, float32 `[...]`.

    iBOT (Zhou et al. 2022, equation 2) weighs that of a masked patch by 1 / (masked patches of its
    crop), see `patch_weights`, sums, and divides by the number of crops, those without a mask
    included.

    Args:
      student: logits `[..., K]`, such as those of patches that the student did not see.
      teacher: probabilities `[..., K]` of the same rows.
    """
    log_p = jax.nn.log_softmax(student / temperature, axis=-1)
    return -(jax.lax.stop_gradient(teacher) * log_p).sum(-1)


def patch_weights(masks: Array) -> Array:
    """Returns 1 / (masked patches of the crop) at masked patches `[crops, N]`, 0 elsewhere."""
    masks = masks.astype(jnp.float32)
    return masks / jnp.maximum(masks.sum(-1, keepdims=True), 1.0)
