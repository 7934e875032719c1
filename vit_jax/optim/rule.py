"""What an update rule is, and how a config finds one.

A rule is a function that takes the keys of `config.optim.args` and returns an optax
`GradientTransformation` whose updates are the *direction* of descent: the raw step before learning
rate, weight decay and sign, which `Optimizer` applies to all rules alike. Where that order does not
fit, the function returns a `Rule` instead. A function with an argument `blocks` is given
`config.optim.blocks`, to tell parameters that are stacked along a layer axis.

The state of a rule is made of named tuples and dicts whose names are those of checkpoints.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from vit_jax.errors import UserError, nearest
from vit_jax.optim import rules
from vit_jax.optim.plugins import import_function
from vit_jax.types import Params

_WHERE = "config.optim.name"


class Rule(NamedTuple):
    """A direction of descent and, for rules that need them, what happens around it.

    after_decay: stateless, transforms direction plus decay, before the learning rate.
    around: `around(step, lr)` is given the whole step, a transformation whose updates are ready to
        be added to the parameters, and this step's learning rate, and returns what replaces it.
    evaluation_params: `(state, params)` to the parameters to evaluate and publish, where those
        differ from the ones that gradients are taken at.
    """

    direction: optax.GradientTransformation
    after_decay: optax.GradientTransformation | None = None
    around: (
        Callable[[optax.GradientTransformation, jax.Array], optax.GradientTransformation] | None
    ) = None
    evaluation_params: Callable[[Any, Params], Params] | None = None

    def init(self, params: Params) -> Any:
        """The state for `params` before the first update, which no learning rate has a part in."""
        whole = self.around(self.direction, jnp.float32(0)) if self.around else self.direction
        return whole.init(params)


def load_rule(name: str, args: Mapping[str, Any], *, blocks: str) -> Rule:
    """The rule called `name`, made with `args`; mistakes in either raise `UserError`."""
    function = _find(name)
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key in args:
        if key not in parameters and not open_ended:
            raise UserError(
                f"config.optim.args.{key}: {name} does not take it; {nearest(key, parameters)}"
            )
    if "blocks" in parameters:
        args = {"blocks": blocks, **args}
    try:
        rule = function(**args)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.optim.args: {name} refuses {dict(args)}: {error}") from error
    return rule if isinstance(rule, Rule) else Rule(rule)


def state_name(name: str) -> str:
    """The key of the rule's state in the optimizer's state, and so in checkpoints."""
    return name.rpartition(":")[2]


def _find(name: str) -> Callable:
    if ":" in name:
        return import_function(name, where=_WHERE, kind="optimizer")
    ours = {module.name for module in pkgutil.iter_modules(rules.__path__)}
    if name in ours:
        return getattr(importlib.import_module(f"{rules.__name__}.{name}"), name)
    prefix = "scale_by_"
    for package in (optax, optax.contrib):
        if hasattr(package, prefix + name):
            return getattr(package, prefix + name)
    in_optax = {n.removeprefix(prefix) for n in dir(optax) + dir(optax.contrib) if prefix in n}
    raise UserError(f"{_WHERE}: unknown optimizer {name!r}; {nearest(name, ours | in_optax)}")
