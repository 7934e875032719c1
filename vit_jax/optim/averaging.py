"""Exponential moving average of the parameters (Polyak & Juditsky, 1992)."""

import jax
import jax.numpy as jnp

from vit_jax.types import Params


def ema_update(ema: Params, params: Params, step: int | jax.Array, decay: float) -> Params:
    """Returns the average updated with `params`: d·ema + (1 - d)·params.

    At first, the average would consist mostly of its initial value. Therefore
    d = min(decay, (1 + t) / (10 + t)), the warm-up of TensorFlow's `ExponentialMovingAverage` with
    `num_updates = t`. The average keeps its own dtype (float32 for parameters of any dtype).

    step: t, the number of updates of the average before this one.
    decay: the final value of d, such as 0.9999.
    """
    t = jnp.asarray(step, jnp.int32).astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    return jax.tree.map(lambda e, p: (e + (1.0 - d) * (p - e)).astype(e.dtype), ema, params)
