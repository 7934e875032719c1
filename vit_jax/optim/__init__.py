"""Optimizers: update rules, schedules, decay and freeze masks, parameter averaging.

    optimizer = optim.build(config.optim, params, duration=duration)
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params, step)
    params = optax.apply_updates(params, updates)

`vit_jax.config` lists every key of `config.optim` with its meaning. The learning rate is computed
in one place: `schedules.build` returns the function that both `Optimizer.update` and `Optimizer.lr`
(for logging) call.
"""

from vit_jax.optim.averaging import ema_update
from vit_jax.optim.clipping import clip_by_global_norm
from vit_jax.optim.completion import complete, filled
from vit_jax.optim.groups import Group
from vit_jax.optim.optimizer import Optimizer, build
from vit_jax.optim.rule import Rule
from vit_jax.optim.spec import DEFAULTS

__all__ = [
    "DEFAULTS",
    "Group",
    "Optimizer",
    "Rule",
    "build",
    "clip_by_global_norm",
    "complete",
    "ema_update",
    "filled",
]
