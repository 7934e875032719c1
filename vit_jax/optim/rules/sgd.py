"""Stochastic gradient descent with momentum, which can be stored in bfloat16."""

from typing import NamedTuple

import jax
import optax

from vit_jax.optim.momentum import decayed


class MomentumState(NamedTuple):
    """The momentum mu, with the structure and shapes of the parameters."""

    mu: optax.Updates


def sgd(
    momentum: float = 0.9, momentum_dtype: str = "float32", nesterov: bool = False
) -> optax.GradientTransformation:
    """Returns the direction m of heavy-ball momentum: m = g + momentum·m, without averaging factor.

    momentum_dtype: the dtype in which m is stored; both Vision Transformer references fine-tune
        with "bfloat16". The direction is m before rounding (see `momentum.decayed`).
    nesterov: returns the direction g + momentum·m (Sutskever et al., 2013).
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
