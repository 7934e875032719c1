"""A teacher that is the moving average of the student."""

import jax

from vit_jax.types import Array, Params


def averaged(teacher: Params, student: Params, momentum: Array | float) -> Params:
    """Returns momentum · teacher + (1 - momentum) · student, for every parameter.

    (Tarvainen & Valpola 2017; He et al. 2020, MoCo.) Unlike `optim.ema_update` it has no warm-up:
    the methods say which momentum each step has.
    """
    return jax.tree.map(
        lambda t, s: (momentum * t + (1.0 - momentum) * s).astype(t.dtype), teacher, student
    )
