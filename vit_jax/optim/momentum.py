"""Momentum stored in few bits: how the references round it."""

import jax
import jax.numpy as jnp
import numpy as np


def decayed(moment: jax.Array, decay: float) -> jax.Array:
    """`decay · moment` in float32, `decay` rounded to the dtype the moment is stored in.

    0.9 stored in bfloat16 is 0.8984375. The references multiply a bfloat16 array by a Python
    number, which rounds the number; compiled, the product itself is not rounded. Written out, the
    result no longer depends on what a compiler fuses. With float32 moments nothing is rounded.
    """
    rounded = np.asarray(decay, moment.dtype).astype(np.float32)
    return rounded * moment.astype(jnp.float32)
