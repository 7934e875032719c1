"""Stochastic gradient descent with momentum, stored in bfloat16 if asked."""

from typing import NamedTuple

import jax
import optax

from vit_jax.optim.momentum import decayed


class MomentumState(NamedTuple):
    """mu: the momentum, like the parameters in structure and shapes."""

    mu: optax.Updates


def sgd(
    momentum: float = 0.9, momentum_dtype: str = "float32", nesterov: bool = False
) -> optax.GradientTransformation:
    """Heavy-ball momentum m = g + momentum·m, without an averaging factor; direction m.

    momentum_dtype: dtype in which m is stored; "bfloat16" is what both Vision Transformer
        references fine-tune with. The direction is m before rounding (see `momentum.decayed`).
    nesterov: direction g + momentum·m (Sutskever et al., 2013).
    """

    def init(params: optax.Params) -> MomentumState:
        return MomentumState(optax.tree.zeros_like(params, dtype=momentum_dtype))

    def update(
        grads: optax.Updates, state: MomentumState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MomentumState]:
        del params
        mu = jax.tree.map(lambda g, m: g + decayed(m, momentum), grads, state.mu)
        direction = jax.tree.map(lambda g, m: g + momentum * m, grads, mu) if nesterov else mu
        return direction, MomentumState(optax.tree.cast(mu, momentum_dtype))

    return optax.GradientTransformation(init, update)
