"""The schedules of self-supervised methods, as their published code computes them.

They are curves of `vit_jax.optim.schedules` that have a warm-up of their own, so `build` adds none:
the multiplier of the base value, from the 0-based step, the number of warm-up steps and the number
of all steps. Learning rates, weight decays, a teacher's momentum and its temperature all follow
them. The result has the default float type, float64 where a caller enables it.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError


def has_warmup(curve: Callable) -> Callable:
    """Marks a curve that rises by itself, so that `schedules.build` adds no warm-up."""
    curve.__dict__["has_warmup"] = True
    return curve


@has_warmup
def dino(
    step: jax.Array | int,
    start: int,
    total: int,
    *,
    end: float = 0.0,
    first: float = 0.0,
    zero_until: int = 0,
) -> jax.Array:
    """Rises linearly from `first` to 1, both within the warm-up, then falls as a cosine to `end`.

    (Caron et al. 2021, DINO; Oquab et al. 2023, DINOv2.) The last step of the warm-up has the base
    value, and so has the step after it; `end` is reached after the last step. The linear ramp of
    DINOv2's temperature is this curve with end=1, and start=total.

    zero_until: the step before which the value is 0 (DINOv2's last layer).
    """
    at = _float(step)
    ramp = first + (1.0 - first) * at / max(start - 1, 1)
    progress = jnp.clip((at - start) / max(total - start, 1), 0.0, 1.0)
    value = jnp.where(at < start, ramp, _cosine(progress, end))
    return jnp.where(at < zero_until, 0.0, value)


@has_warmup
def ijepa(
    step: jax.Array,
    start: int,
    total: int,
    *,
    end: float = 0.0,
    first: float = 0.0,
    stretch: float = 1.0,
) -> jax.Array:
    """Rises linearly from `first`, then follows a cosine to `end` (Assran et al. 2023, I-JEPA).

    The published code advances its schedules before each step, so that step s has the value of
    s + 1. Beyond `total` the cosine turns back, as there; `end` may be larger than 1.

    stretch: the curve is that of a run this many times as long, at least 1; 1.25 in the paper.
    """
    if stretch < 1.0:
        raise UserError(f"config.optim.schedule: ijepa's stretch={stretch:g}: write 1 or more")
    step, total = _float(step) + 1.0, int(stretch * total)
    ramp = first + (1.0 - first) * step / max(start, 1)
    value = _cosine((step - start) / max(total - start, 1), end)
    value = jnp.maximum(value, end) if end <= 1.0 else jnp.minimum(value, end)
    return jnp.where(step < start, ramp, value)


@has_warmup
def simmim(
    step: jax.Array, start: int, total: int, *, end: float = 0.0, first: float = 0.0
) -> jax.Array:
    """Rises linearly from `first`, then follows a cosine to `end` (Xie et al. 2022, SimMIM).

    The published code sets the rate after each step, so that the first two steps have the same
    value and each later one has that of the step before. The cosine counts from step 0, the warm-up
    is not taken off.
    """
    step = jnp.maximum(_float(step) - 1.0, 0.0)
    value = jnp.where(step < total, _cosine(step / max(total, 1), end), end)
    return jnp.where(step < start, first + (1.0 - first) * step / max(start, 1), value)


@has_warmup
def simmim_stair(
    step: jax.Array,
    start: int,
    total: int,
    *,
    boundaries: Sequence[int],
    factors: Sequence[float],
    first: float = 0.0,
) -> jax.Array:
    """Rises linearly from `first`, then steps to `factors[i]` at step `boundaries[i]` (SimMIM).

    The boundaries are absolute. Each step has the value of the step before, as in `simmim`.
    """
    del total
    step = jnp.maximum(_float(step) - 1.0, 0.0)
    value = stage(step, boundaries, factors)
    return jnp.where(step < start, first + (1.0 - first) * step / max(start, 1), value)


def stage(at: jax.Array, boundaries: Sequence[int], factors: Sequence[float]) -> jax.Array:
    """Returns 1, or `factors[i]` where `at` is a step from `boundaries[i]` on.

    Raises:
      UserError: the boundaries do not ascend, or there are not as many factors.
    """
    if len(boundaries) == 0 or len(boundaries) != len(factors):
        raise UserError(
            f"config.optim.schedule: stairs need as many factors as boundaries, at least one; got "
            f"{len(factors)} factors for {len(boundaries)} boundaries"
        )
    if list(boundaries) != sorted(boundaries):
        raise UserError(f"config.optim.schedule.boundaries must ascend, got {list(boundaries)}")
    number = jnp.searchsorted(jnp.asarray(boundaries, at.dtype), at, side="right")
    return jnp.asarray([1.0, *factors], jnp.result_type(float))[number]


def _cosine(progress: jax.Array, end: float) -> jax.Array:
    return end + (1.0 - end) * 0.5 * (1.0 + jnp.cos(math.pi * progress))


def _float(step: jax.Array | int) -> jax.Array:
    return jnp.asarray(step).astype(jnp.result_type(float))
