"""The optimizer: pure functions `init` and `update`, built from `config.optim` and shapes.

The order of one update, for every rule:

    gradient → clip → the rule's direction u → weight decay → learning rate → minus

with lr·schedule(step), decay·decay_schedule(step), the multipliers and the decay of each
parameter's group. Frozen parameters are taken out before the first stage, so they have neither
state nor a part in the norm. Parameters that are frozen for a time are left alone until then, and
the rule counts their own updates; their gradients are a part of the norm from the first step on, as
in the code of DINO and DINOv2.

The state is `{name of the rule: its state}`: clipping, decay, schedules and multipliers keep none,
so they can be changed between two halves of a run and the checkpoint still restores by name.
Parameters of `freeze_until[i]` have a state of their own, `{name of the rule}_late{i}`.
Where a part of the state mirrors the parameters (moments, averages), the path of each leaf ends in
its parameter's path and the shapes agree: that is how its sharding is found.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.optim import clipping, groups, schedules, spec
from vit_jax.optim.rule import Rule, load_rule, state_name
from vit_jax.types import Params

State = dict[str, Any]


def build(
    config: Mapping[str, Any],
    params: Params,
    *,
    duration: Duration,
    total_steps: int | None = None,
) -> "Optimizer":
    """Returns the optimizer of `config.optim` for parameters with the shapes of `params`.

    Args:
      config: the keys of `config.optim` that differ from `optim.DEFAULTS`.
      params: a nested dict of arrays or `ShapeDtypeStruct`, without boxes.
      duration: converts a duration in any unit to steps; its `total` replaces absent `total_steps`.

    Raises:
      UserError: a key or a rule is unknown, a value is wrong, or two of them exclude each other.
    """
    resolved = spec.resolve(config)
    groups.block_pattern(resolved["blocks"])
    total = duration.total if total_steps is None else total_steps

    def schedule(keys: Mapping[str, Any], where: str) -> schedules.Schedule:
        where = f"config.optim.{where}"
        return schedules.build(keys, total_steps=total, duration=duration, where=where)

    rule = load_rule(resolved["name"], resolved["args"], blocks=resolved["blocks"])
    if rule.after_decay and resolved["decay_coupling"] != "lr":
        raise UserError(
            f"config.optim.decay_coupling: {resolved['name']} rescales the sum of direction and "
            "decay, so both are multiplied by the learning rate; write 'lr'"
        )
    if resolved["freeze_until"] and (rule.around or rule.evaluation_params):
        raise UserError(
            f"config.optim.freeze_until: {resolved['name']} averages the parameters itself, from"
            " the first step on; leave freeze_until empty"
        )
    starts = [duration(until, "optim.freeze_until") for _, until in resolved["freeze_until"]]
    return Optimizer(
        name=state_name(resolved["name"]),
        rule=rule,
        base_lr=resolved["lr"],
        weight_decay=resolved["weight_decay"],
        decay_times_lr=resolved["decay_coupling"] == "lr",
        clip_norm=resolved["clip_norm"],
        clip_scope=resolved["clip_scope"],
        blocks=resolved["blocks"],
        sam_rho=resolved["sam_rho"],
        schedule=schedule(resolved["schedule"], "schedule"),
        decay_schedule=(
            schedule(resolved["decay_schedule"], "decay_schedule")
            if resolved["decay_schedule"]
            else None
        ),
        starts=tuple(starts),
        group_schedules=tuple(
            schedule(keys, f"group_schedules[{i}]")
            for i, (_, keys) in enumerate(resolved["group_schedules"])
        ),
        table=groups.group_parameters(resolved, params),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Optimizer:
    """Pure functions of parameters and state, all of which may be traced. See `build`."""

    name: str
    rule: Rule
    base_lr: float
    weight_decay: float
    decay_times_lr: bool
    clip_norm: float
    clip_scope: str
    blocks: str
    sam_rho: float
    schedule: schedules.Schedule
    decay_schedule: schedules.Schedule | None
    starts: tuple[int, ...]
    group_schedules: tuple[schedules.Schedule, ...]
    table: Mapping[str, groups.Group]

    def init(self, params: Params) -> State:
        """Returns the initial state. It shares no buffer with `params`, so it can be donated."""
        trainable = self._trainable(params)
        return {
            self._state_name(late): self.rule.init(self._part(trainable, late))
            for late in self._parts()
        }

    def freeze(self, params: Params) -> Params:
        """Returns `params` with gradients stopped at the frozen parameters.

        The part of the backward pass that only frozen parameters need is then not computed.
        """

        def hold(path: tuple, param: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(param) if self._group(path).frozen else param

        return jax.tree_util.tree_map_with_path(hold, params)

    def update(
        self, grads: Params, state: State, params: Params, step: schedules.Step
    ) -> tuple[Params, State]:
        """Returns the updates, which the caller *adds* to `params`, and the new state.

        step: the number of updates before this one, so the first update uses schedule(0).
        """
        grads = self._trainable(grads)
        if self.clip_norm:
            grads = clipping.clip(grads, self.clip_norm, self.clip_scope, self.blocks)
        trainable, states = self._trainable(params), {}
        named: dict[str, Any] = {}
        for late in self._parts():
            name = self._state_name(late)
            own_grads, own = self._part(grads, late), self._part(trainable, late)
            updates, states[name] = self._update_part(late, own_grads, own, state[name], step)
            named |= groups.named_leaves(updates)
        return self._with_frozen(named, params, jnp.zeros_like), states

    def _update_part(
        self, late: int | None, grads: Params, params: Params, state: Any, step: schedules.Step
    ) -> tuple[Params, Any]:
        """Returns the updates and the state of a part, which change nothing until it starts."""
        updates, after = self._whole_step(step).update(grads, state, params)
        if late is None:
            return updates, after
        has_started = jnp.asarray(step, jnp.int32) >= self.starts[late]
        return jax.tree.map(
            lambda new, old: jnp.where(has_started, new, old),
            (updates, after),
            (jax.tree.map(jnp.zeros_like, updates), state),
        )

    def ascend(self, params: Params, grads: Params) -> Params:
        """Returns the parameters of highest loss within `sam_rho` of `params`, to first order.

        Sharpness-aware minimization (SAM; Foret et al., 2021, equation 2) descends along the
        gradient at `params + rho · grads / norm`, with the norm of all trainable parameters. Frozen
        parameters are unchanged.
        """
        grads = self._trainable(grads)
        norm = jnp.maximum(optax.tree.norm(grads), jnp.finfo(jnp.float32).tiny)
        climb = groups.named_leaves(jax.tree.map(lambda g: g * (self.sam_rho / norm), grads))
        return optax.apply_updates(params, self._with_frozen(climb, params, jnp.zeros_like))

    def lr(self, step: schedules.Step) -> jax.Array:
        """Returns the learning rate of `update` at `step`, before multipliers; float32 scalar."""
        return self.base_lr * self.schedule(step)

    def evaluation_params(self, params: Params, state: State) -> Params:
        """Returns the parameters to evaluate and publish: `params`, or their average if kept."""
        if self.rule.evaluation_params is None:
            return params
        averaged = self.rule.evaluation_params(state[self.name], self._trainable(params))
        return self._with_frozen(groups.named_leaves(averaged), params, lambda param: param)

    def describe(self) -> list[groups.Group]:
        """Returns one row per parameter: name, shape, decay, multiplier, schedule, frozen."""
        return list(self.table.values())

    def _whole_step(self, step: schedules.Step) -> optax.GradientTransformation:
        """Returns the rule and all later stages as one transformation, for the update at `step`."""

        def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
            direction, state = self.rule.direction.update(grads, state, params)
            return self._descend(direction, params, step), state

        whole = optax.GradientTransformation(self.rule.direction.init, update)
        return self.rule.around(whole, self.lr(step)) if self.rule.around else whole

    def _descend(self, direction: Params, params: Params, step: schedules.Step) -> Params:
        """Converts a direction to an update: weight decay, multipliers, learning rate, minus."""
        rates: dict[int | None, jax.Array] = {
            i: schedule(step) for i, schedule in enumerate(self.group_schedules)
        }
        rates[None] = self.schedule(step)

        def times_lr(path: tuple, u: jax.Array) -> jax.Array:
            return self.base_lr * _along_layers(self._group(path).lr_mult, u.ndim) * u

        def minus_scheduled(path: tuple, u: jax.Array) -> jax.Array:
            return -rates[self._group(path).schedule] * u

        if self.decay_times_lr:
            direction = self._with_decay(direction, params, step)
            if self.rule.after_decay:
                direction, _ = self.rule.after_decay.update(direction, optax.EmptyState(), params)
        change = jax.tree_util.tree_map_with_path(times_lr, direction)
        if not self.decay_times_lr:
            change = self._with_decay(change, params, step)
        return jax.tree_util.tree_map_with_path(minus_scheduled, change)

    def _with_decay(self, updates: Params, params: Params, step: schedules.Step) -> Params:
        factor = self.decay_schedule(step) if self.decay_schedule else 1.0

        def add(path: tuple, u: jax.Array, w: jax.Array) -> jax.Array:
            decay = self.weight_decay * self._group(path).decay
            return u + (decay * factor) * w if decay else u

        return jax.tree_util.tree_map_with_path(add, updates, params)

    def _parts(self) -> list[int | None]:
        """Returns the parts of the trainable parameters: None, and the numbers of the late ones."""
        found = {group.late for group in self.table.values() if not group.frozen}
        return sorted(found, key=lambda late: -1 if late is None else late)

    def _part(self, trainable: Params, late: int | None) -> Params:
        """Returns the entries of trainable parameters that belong to one part."""
        return flax.traverse_util.unflatten_dict(
            {
                name: leaf
                for name, leaf in groups.named_leaves(trainable).items()
                if self.table[name].late == late
            },
            sep="/",
        )

    def _state_name(self, late: int | None) -> str:
        return self.name if late is None else f"{self.name}_late{late}"

    def _group(self, path: tuple) -> groups.Group:
        return self.table[groups.name_of(path)]

    def _trainable(self, tree: Params) -> Params:
        """Returns `tree` without the entries of frozen parameters."""
        named = groups.named_leaves(tree)
        if named.keys() != self.table.keys():
            odd = sorted(named.keys() ^ self.table.keys())
            raise ValueError(f"not the parameters this optimizer was built for; differing: {odd}")
        return flax.traverse_util.unflatten_dict(
            {name: leaf for name, leaf in named.items() if not self.table[name].frozen}, sep="/"
        )

    def _with_frozen(
        self, named: Mapping[str, Any], params: Params, frozen: Callable[[jax.Array], jax.Array]
    ) -> Params:
        """Returns a tree like `params` with the entries `named`, or else `frozen(parameter)`."""

        def entry(path: tuple, param: jax.Array) -> jax.Array:
            name = groups.name_of(path)
            return named[name] if name in named else frozen(param)

        return jax.tree_util.tree_map_with_path(entry, params)


def _along_layers(multiplier: float | tuple[float, ...], ndim: int) -> float | jax.Array:
    """Returns a multiplier in a shape that broadcasts with a parameter of `ndim` axes.

    The multiplier is one number, or one number for each layer of a stack.
    """
    if not isinstance(multiplier, tuple):
        return multiplier
    return jnp.asarray(multiplier, jnp.float32).reshape((-1,) + (1,) * (ndim - 1))
