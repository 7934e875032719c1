"""The optimizer: pure functions `init` and `update`, built from `config.optim` and shapes.

The order of one update, for every rule:

    gradient → clip by global norm → the rule's direction u → weight decay → learning rate → minus

with lr·schedule(step), the multipliers and the decay of each parameter's group. Frozen parameters
are taken out before the first stage, so they have neither state nor a part in the norm.

The state is `{name of the rule: its state}`: clipping, decay, schedules and multipliers keep none,
so they can be changed between two halves of a run and the checkpoint still restores by name.
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

from vit_jax.errors import UserError
from vit_jax.optim import groups, schedules, spec
from vit_jax.optim.rule import Rule, load_rule, state_name
from vit_jax.types import Params

State = dict[str, Any]


def build(
    config: Mapping[str, Any],
    params: Params,
    *,
    duration: schedules.Duration,
    total_steps: int | None = None,
) -> "Optimizer":
    """Returns the optimizer of `config.optim` for parameters with the shapes of `params`.

    params: a nested dict of arrays or `ShapeDtypeStruct`, without boxes.
    duration: converts a duration in any unit to steps; its `total` is the length of the run if
        `total_steps` is not given.
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
    return Optimizer(
        name=state_name(resolved["name"]),
        rule=rule,
        base_lr=resolved["lr"],
        weight_decay=resolved["weight_decay"],
        decay_times_lr=resolved["decay_coupling"] == "lr",
        clip_norm=resolved["clip_norm"],
        sam_rho=resolved["sam_rho"],
        schedule=schedule(resolved["schedule"], "schedule"),
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
    sam_rho: float
    schedule: schedules.Schedule
    group_schedules: tuple[schedules.Schedule, ...]
    table: Mapping[str, groups.Group]

    def init(self, params: Params) -> State:
        """Returns the initial state. It shares no buffer with `params`, so it can be donated."""
        return {self.name: self.rule.init(self._trainable(params))}

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
            grads = clip_by_global_norm(grads, self.clip_norm)
        whole = self._whole_step(step)
        updates, rule_state = whole.update(grads, state[self.name], self._trainable(params))
        return self._with_frozen(updates, params, jnp.zeros_like), {self.name: rule_state}

    def ascend(self, params: Params, grads: Params) -> Params:
        """Returns the parameters of highest loss within `sam_rho` of `params`, to first order.

        Sharpness-aware minimization (SAM; Foret et al., 2021, equation 2) descends along the
        gradient at `params + rho · grads / norm`, with the norm of all trainable parameters. Frozen
        parameters are unchanged.
        """
        grads = self._trainable(grads)
        norm = jnp.maximum(optax.tree.norm(grads), jnp.finfo(jnp.float32).tiny)
        climb = jax.tree.map(lambda g: g * (self.sam_rho / norm), grads)
        return optax.apply_updates(params, self._with_frozen(climb, params, jnp.zeros_like))

    def lr(self, step: schedules.Step) -> jax.Array:
        """Returns the learning rate of `update` at `step`, before multipliers; float32 scalar."""
        return self.base_lr * self.schedule(step)

    def evaluation_params(self, params: Params, state: State) -> Params:
        """Returns the parameters to evaluate and publish: `params`, or their average if kept."""
        if self.rule.evaluation_params is None:
            return params
        averaged = self.rule.evaluation_params(state[self.name], self._trainable(params))
        return self._with_frozen(averaged, params, lambda param: param)

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
        rates = {i: schedule(step) for i, schedule in enumerate(self.group_schedules)}
        rates[None] = self.schedule(step)

        def times_lr(path: tuple, u: jax.Array) -> jax.Array:
            return self.base_lr * _along_layers(self._group(path).lr_mult, u.ndim) * u

        def minus_scheduled(path: tuple, u: jax.Array) -> jax.Array:
            return -rates[self._group(path).schedule] * u

        if self.decay_times_lr:
            direction = self._with_decay(direction, params)
            if self.rule.after_decay:
                direction, _ = self.rule.after_decay.update(direction, optax.EmptyState(), params)
        change = jax.tree_util.tree_map_with_path(times_lr, direction)
        if not self.decay_times_lr:
            change = self._with_decay(change, params)
        return jax.tree_util.tree_map_with_path(minus_scheduled, change)

    def _with_decay(self, updates: Params, params: Params) -> Params:
        def add(path: tuple, u: jax.Array, w: jax.Array) -> jax.Array:
            decay = self.weight_decay * self._group(path).decay
            return u + decay * w if decay else u

        return jax.tree_util.tree_map_with_path(add, updates, params)

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
        self, trainable: Params, params: Params, frozen: Callable[[jax.Array], jax.Array]
    ) -> Params:
        """Returns a tree like `params` with the entries of `trainable`, or `frozen(parameter)`."""
        named = groups.named_leaves(trainable)

        def entry(path: tuple, param: jax.Array) -> jax.Array:
            name = groups.name_of(path)
            return named[name] if name in named else frozen(param)

        return jax.tree_util.tree_map_with_path(entry, params)


def clip_by_global_norm(grads: Params, max_norm: float) -> Params:
    """Returns `grads · min(1, max_norm / norm)`.

    There is no epsilon, so gradients below the limit are unchanged.
    """
    scale = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))
    return jax.tree.map(lambda g: g * scale, grads)


def _along_layers(multiplier: float | tuple[float, ...], ndim: int) -> float | jax.Array:
    """Returns a multiplier in a shape that broadcasts with a parameter of `ndim` axes.

    The multiplier is one number, or one number for each layer of a stack.
    """
    if not isinstance(multiplier, tuple):
        return multiplier
    return jnp.asarray(multiplier, jnp.float32).reshape((-1,) + (1,) * (ndim - 1))
