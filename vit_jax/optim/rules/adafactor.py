"""Adafactor with momentum in bfloat16, which trained the large Vision Transformers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.optim.groups import is_stacked, name_of
from vit_jax.optim.momentum import decayed


class AdafactorState(NamedTuple):
    """The second moment (optax's state, with rows and columns by parameter) and the momentum mu."""

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
    blocks: str,
) -> optax.GradientTransformation:
    """Returns Adafactor (Shazeer & Stern, 2018), in the variant of Zhai et al., 2022 (section 3.4).

    It differs from the original in three properties: it has momentum, an exponential average in
    half precision; the decay of the second moment is capped; and it has neither update clipping nor
    relative step sizes.

    The layers of a stacked parameter are factored and clipped one by one, so scanning over the
    blocks does not change the result.

    beta2_cap: the second moment decays by min(1 - (t + 1)^-decay_rate, beta2_cap) at step t from 0.
    min_dim_size_to_factor: the second moment is a row times a column over the two largest axes
        if the smaller of them has at least this size, else a full array.
    clipping_threshold: the largest root mean square of a parameter's scaled gradient; 0 is off.
    momentum: m = (1 - momentum)·u + momentum·m, not corrected for its zero start.
    """
    rms = optax.scale_by_factored_rms(
        decay_rate=decay_rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
        decay_rate_fn=_capped(beta2_cap),
    )
    clip = optax.clip_by_block_rms(clipping_threshold) if clipping_threshold else optax.identity()

    init_array, update_array = _by_array(rms, clip, blocks)

    def init(params: optax.Params) -> AdafactorState:
        states = jax.tree_util.tree_map_with_path(init_array, params)
        mu = optax.tree.zeros_like(params, dtype=momentum_dtype)
        return AdafactorState(_gathered(params, states, jnp.zeros([], jnp.int32)), mu)

    def update(
        grads: optax.Updates, state: AdafactorState, params: optax.Params
    ) -> tuple[optax.Updates, AdafactorState]:
        old = state.second_moment
        counts = jax.tree.map(lambda _: old.count, params)
        found = jax.tree_util.tree_map_with_path(
            update_array, grads, params, counts, old.v_row, old.v_col, old.v
        )
        scaled, states = (
            jax.tree.map(lambda _, both, i=i: both[i], params, found) for i in range(2)
        )
        mu = jax.tree.map(lambda u, m: (1 - momentum) * u + decayed(m, momentum), scaled, state.mu)
        second_moment = _gathered(params, states, optax.safe_increment(old.count))
        return mu, AdafactorState(second_moment, optax.tree.cast(mu, momentum_dtype))

    return optax.GradientTransformation(init, update)


def _by_array(
    rms: optax.GradientTransformation, clip: optax.GradientTransformation, blocks: str
) -> tuple[Callable, Callable]:
    """Returns the init and update of one array, which treat stacked layers one by one."""

    def init_array(path: tuple, param: jax.Array) -> optax.FactoredState:
        if not is_stacked(name_of(path), blocks):
            return rms.init(param)
        return jax.vmap(rms.init, out_axes=_layer_axes(rms, param))(param)

    def update_array(
        path: tuple, grad: jax.Array, param: jax.Array, *state: jax.Array
    ) -> tuple[jax.Array, optax.FactoredState]:
        def update(
            grad: jax.Array, param: jax.Array, state: optax.FactoredState
        ) -> tuple[jax.Array, optax.FactoredState]:
            scaled, state = rms.update(grad, state, param)
            return clip.update(scaled, optax.EmptyState())[0], state

        if is_stacked(name_of(path), blocks):
            axes = _layer_axes(rms, param)
            update = jax.vmap(update, in_axes=(0, 0, axes), out_axes=(0, axes))
        return update(grad, param, optax.FactoredState(*state))

    return init_array, update_array


def _layer_axes(rms: optax.GradientTransformation, stack: jax.Array) -> optax.FactoredState:
    """Returns the layer axis of each part of a stack's state; None for unused placeholders."""
    one = jax.eval_shape(rms.init, jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype))
    is_factored = one.v_row.shape != (1,)
    factors, whole = (0, None) if is_factored else (None, 0)
    return optax.FactoredState(count=None, v_row=factors, v_col=factors, v=whole)


def _gathered(params: optax.Params, states: Any, count: jax.Array) -> optax.FactoredState:
    """Combines the states of all parameters into one state, whose parts are trees of arrays."""

    def part(name: str) -> Any:
        return jax.tree.map(lambda _, state: getattr(state, name), params, states)

    return optax.FactoredState(count, part("v_row"), part("v_col"), part("v"))


def _capped(cap: float) -> Callable[[jax.Array, float], jax.Array]:
    def decay(step: jax.Array, rate: float) -> jax.Array:
        t = jnp.asarray(step + 1, jnp.float32)
        return jnp.minimum(1.0 - t**-rate, cap)

    return decay
