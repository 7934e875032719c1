"""Adafactor as it trained the large Vision Transformers: with momentum in bfloat16."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.optim.momentum import decayed


class AdafactorState(NamedTuple):
    """second_moment: optax's state, rows and columns by parameter; mu: the momentum."""

    second_moment: optax.FactoredState
    mu: optax.Updates


def adafactor(
    *,
    beta2_cap: float = 0.999,
    decay_rate: float = 0.8,
    min_dim_size_to_factor: int = 32,
    clipping_threshold: float = 0.0,
    momentum: float = 0.9,
    momentum_dtype: str = "bfloat16",
) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern, 2018) in the variant of Zhai et al., 2022 (section 3.4).

    It differs from the original by its momentum, an exponential average in half precision, by the
    cap on the second moment's decay, and by having neither update clipping nor relative steps.

    beta2_cap: the second moment decays by min(1 - (t + 1)^-decay_rate, beta2_cap) at step t from 0.
    min_dim_size_to_factor: the second moment is a row times a column over the two largest axes
        where the smaller of them has at least this size, else a full array.
    clipping_threshold: largest root mean square of a parameter's scaled gradient; 0 is off.
    momentum: m = (1 - momentum)·u + momentum·m, not corrected for its zero start.
    """
    second_moment = optax.scale_by_factored_rms(
        decay_rate=decay_rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
        decay_rate_fn=_capped(beta2_cap),
    )
    clip = optax.clip_by_block_rms(clipping_threshold) if clipping_threshold else optax.identity()

    def init(params: optax.Params) -> AdafactorState:
        mu = optax.tree.zeros_like(params, dtype=momentum_dtype)
        return AdafactorState(second_moment.init(params), mu)

    def update(
        grads: optax.Updates, state: AdafactorState, params: optax.Params
    ) -> tuple[optax.Updates, AdafactorState]:
        scaled, factors = second_moment.update(grads, state.second_moment, params)
        scaled, _ = clip.update(scaled, optax.EmptyState())
        mu = jax.tree.map(lambda u, m: (1 - momentum) * u + decayed(m, momentum), scaled, state.mu)
        return mu, AdafactorState(factors, optax.tree.cast(mu, momentum_dtype))

    return optax.GradientTransformation(init, update)


def _capped(cap: float) -> Callable[[jax.Array, float], jax.Array]:
    def decay(step: jax.Array, rate: float) -> jax.Array:
        t = jnp.asarray(step + 1, jnp.float32)
        return jnp.minimum(1.0 - t**-rate, cap)

    return decay
