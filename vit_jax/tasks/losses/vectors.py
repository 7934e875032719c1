"""Losses of vectors: the spread of a batch on the sphere, and the smooth L1 distance."""

import jax
import jax.numpy as jnp

from vit_jax.models.heads.prototypes import unit
from vit_jax.types import Array

_EPSILON = 1e-8


def nearest_others(x: Array) -> Array:
    """Returns, for each row of `[N, dim]`, the number of the other row with the largest product."""
    products = jnp.einsum("nd,md->nm", x, x, precision="highest")
    return jnp.argmax(jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, products), axis=1)


def koleo_losses(x: Array) -> Array:
    """Returns -log of each row's distance to its nearest neighbor, float32 `[N]`.

    The mean is the Kozachenko-Leonenko estimate of entropy, up to constants: it spreads a batch
    evenly over the sphere (Sablayrolles et al. 2019; Oquab et al. 2023, DINOv2, section 4). The
    choice of a neighbor has no gradient; the neighbor has.

    Args:
      x: vectors `[N, dim]` of different images, of any length; they are normalized here.
    """
    x = unit(x.astype(jnp.float32), _EPSILON)
    nearest = nearest_others(jax.lax.stop_gradient(x))
    distance = jnp.linalg.norm(x - x[nearest] + _EPSILON, axis=-1)
    return -jnp.log(distance + _EPSILON)


def smooth_l1(difference: Array, beta: float = 1.0) -> Array:
    """Returns d² / (2 beta) where |d| < beta, and |d| - beta / 2 elsewhere (Girshick 2015)."""
    size = jnp.abs(difference)
    return jnp.where(size < beta, 0.5 * jnp.square(difference) / beta, size - 0.5 * beta)
