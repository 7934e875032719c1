"""Momentum in low precision, rounded as in the reference implementations."""

import jax
import jax.numpy as jnp
import numpy as np


def decayed(moment: jax.Array, decay: float) -> jax.Array:
    """Returns `decay · moment` in float32, with `decay` rounded to the dtype of the moment.

    In bfloat16, 0.9 becomes 0.8984375. The reference implementations multiply a bfloat16 array by a
    Python number, which rounds the number; in compiled code, the product itself is not rounded.
    This function states the roundings explicitly, so the result does not depend on the fusions of a
    compiler. Float32 moments are not rounded.
    """
    rounded = np.asarray(decay, moment.dtype).astype(np.float32)
    return moment.astype(jnp.float32) * rounded
