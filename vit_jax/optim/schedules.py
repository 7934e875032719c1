"""Learning-rate schedules: pure functions from a 0-based step to a multiplier of the base rate.

Every schedule is a curve times a linear warm-up from 0 times a linear cool-down to 0:

    multiplier(s) = curve(s) · min(1, s / warmup) · clip((total - s) / cooldown, 0, 1)

The curve's own progress, p = clip((s - warmup) / (total - warmup), 0, 1), starts when the warm-up
ends. This is the composition of big_vision's schedules; the curves without cool-down are also those
of the Vision Transformer paper (Dosovitskiy et al., 2021, table 3: cosine for ImageNet, linear for
the larger sets), and rsqrt with cool-down that of Zhai et al., 2022 ("Scaling Vision Transformers",
section 3.5).

A new curve is a function `curve(step, start, total, *, keys...)` in this file or in
`method_schedules`, or elsewhere, named in the config as `package.module:function`. Its keys are set
in the section `config.optim.schedule`, and those that this section does not have in
`schedule.args`. A curve whose attribute `has_warmup` is true rises by itself, as those of
`method_schedules` do.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.config import schema
from vit_jax.errors import UserError
from vit_jax.optim import method_schedules
from vit_jax.plugins import Kind, check_known, takes

Step = int | jax.Array
Schedule = Callable[[Step], jax.Array]
Duration = Callable[[int | str], int]

_KEYS: Mapping[str, schema.Key] = schema.SCHEMA["optim"]["schedule"]


def cosine(step: jax.Array, start: int, total: int, *, end: float = 0.0) -> jax.Array:
    """Decays from 1 to `end` by half a cosine (Loshchilov & Hutter, 2017, "SGDR", no restarts)."""
    return end + (1.0 - end) * 0.5 * (1.0 + jnp.cos(math.pi * _progress(step, start, total)))


def linear(step: jax.Array, start: int, total: int, *, end: float = 0.0) -> jax.Array:
    """Decays linearly from 1 to `end`."""
    return end + (1.0 - end) * (1.0 - _progress(step, start, total))


def polynomial(
    step: jax.Array, start: int, total: int, *, end: float = 0.0, power: float = 1.0
) -> jax.Array:
    """Decays from 1 to `end` by a power of the remaining share (Chen et al., 2017, "DeepLab").

    power: above 0.
    """
    if power <= 0:
        raise UserError(f"config.optim.schedule: polynomial's power={power:g}: write more than 0")
    return end + (1.0 - end) * (1.0 - _progress(step, start, total)) ** power


def rsqrt(
    step: jax.Array, start: int, total: int, *, timescale: int = 10_000, shift: int = 0
) -> jax.Array:
    """Decays by a reciprocal square root, 1 / sqrt(1 + (s + shift) / timescale).

    The curve does not reach 0, so combine it with a cool-down. `shift` starts further along the
    curve, where a run continues another one; the warm-up then ends at the value that fits.
    """
    if timescale <= 0 or shift < 0:
        raise UserError(
            f"config.optim.schedule: rsqrt's timescale={timescale} and shift={shift}: write more"
            " than 0, and 0 or more"
        )
    del total
    passed = _float(jnp.maximum(step - start, 0)) + float(shift)
    return jax.lax.rsqrt(1.0 + passed / timescale)


def constant(step: jax.Array, start: int, total: int) -> jax.Array:
    """Stays at 1; with a cool-down, the schedule is "warm-up, stable, decay"."""
    del start, total
    return jnp.ones_like(_float(step))


def stair(
    step: jax.Array, start: int, total: int, *, boundaries: Sequence[int], factors: Sequence[float]
) -> jax.Array:
    """Steps from 1 to `factors[i]` at step `boundaries[i]` (an absolute step), for each i."""
    del start, total
    return method_schedules.stage(step, boundaries, factors)


@functools.cache
def _curves() -> dict[str, Callable]:
    """Returns the public functions of a step in this module and in `method_schedules`, by name."""
    return {
        name: found
        for module in (sys.modules[__name__], method_schedules)
        for name, found in inspect.getmembers(module, inspect.isfunction)
        if name[0] != "_" and next(iter(inspect.signature(found).parameters), "") == "step"
    }


SCHEDULES = Kind("schedule", accepts=takes("step", "start", "total"), others=_curves)
"""The finder of the curves that `config.optim.schedule.name` names."""


def build(
    spec: Mapping[str, Any],
    *,
    total_steps: int,
    duration: Duration,
    where: str = "config.optim.schedule",
) -> Schedule:
    """Returns the schedule that `spec` describes, for a run of `total_steps`.

    `spec` contains every key of the default schedule. A key that the named curve does not read must
    have its default value, and the warm-up must not be longer than the run. `duration` converts
    times in any unit to steps. The schedule accepts Python integers and traced int32, up to
    2^31 - 1 steps: differences are computed in integers, so no step count is rounded to float32.
    """
    curve = SCHEDULES.find(spec["name"], f"{where}.name")
    own = _keywords(curve)
    is_key = f"key of the {spec['name']} schedule"
    for key, value in spec.items():
        is_set = key not in _KEYS or value != _KEYS[key].default
        if is_set and key not in {"name", "warmup", "cooldown", "args"}:
            check_known(key, own, f"{where}.{key}", is_key)
    for key in spec["args"]:
        check_known(key, own - _KEYS.keys(), f"{where}.args.{key}", f"further {is_key}")
    steps = {
        key: _in_steps(value, duration) if _is_duration(key) else value
        for key, value in spec.items()
    }
    warmup, cooldown = steps["warmup"], steps["cooldown"]
    for key in ("warmup", "cooldown"):
        if not 0 <= steps[key] <= total_steps:
            raise UserError(
                f"{where}.{key}: {spec[key]!r} is {steps[key]} steps; write a duration from "
                f"0 to the {total_steps} steps of this run"
            )
    arguments = {**{key: steps[key] for key in own if key in steps}, **spec["args"]}

    def schedule(step: Step) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        multiplier = curve(step, warmup, total_steps, **arguments)
        if warmup and not getattr(curve, "has_warmup", False):
            multiplier *= jnp.minimum(1.0, _float(step) / warmup)
        if cooldown:
            multiplier *= jnp.clip(_float(total_steps - step) / cooldown, 0.0, 1.0)
        return multiplier

    jax.eval_shape(schedule, 0)  # A curve refuses its keys here, not inside the first train step.
    return schedule


def _progress(step: jax.Array, start: int, total: int) -> jax.Array:
    return jnp.clip(_float(step - start) / max(total - start, 1), 0.0, 1.0)


def _float(step: jax.Array) -> jax.Array:
    return step.astype(jnp.result_type(float))  # Float64 where a caller enables it.


def _keywords(curve: Callable) -> set[str]:
    parameters = inspect.signature(curve).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _is_duration(key: str) -> bool:
    return key in _KEYS and _KEYS[key].kind == "duration"


def _in_steps(value: Any, duration: Duration) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [duration(item) for item in value]
    return duration(value)
