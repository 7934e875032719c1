"""Exponential moving average of the parameters (Polyak & Juditsky, 1992)."""

import jax
import jax.numpy as jnp

from vit_jax.types import Params


def ema_update(ema: Params, params: Params, step: int | jax.Array, decay: float) -> Params:
    """The average after taking in `params`: d·ema + (1 - d)·params.

    Early on the average would be mostly its starting point, so d = min(decay, (1 + t) / (10 + t)),
    the warm-up of TensorFlow's `ExponentialMovingAverage` with `num_updates = t`. The average keeps
    its own dtype (float32, whatever the parameters are stored in).

    step: t, the number of updates taken into the average before this one.
    decay: d of the long run, such as 0.9999.
    """
    t = jnp.asarray(step, jnp.int32).astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    return jax.tree.map(lambda e, p: (e + (1.0 - d) * (p - e)).astype(e.dtype), ema, params)
