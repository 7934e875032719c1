"""The interface of update rules, and the function that finds a rule by its name.

A rule is a function that takes the keys of `config.optim.args` and returns an optax
`GradientTransformation` whose updates are the *direction* of descent: the raw step before learning
rate, weight decay and sign, which `Optimizer` applies to all rules alike. Where that order does not
fit, the function returns a `Rule` instead. A function with an argument `blocks` is given
`config.optim.blocks`, to identify parameters that are stacked along a layer axis.

The state of a rule is made of named tuples and dicts whose names are those of checkpoints.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from vit_jax.errors import UserError
from vit_jax.plugins import Kind, check_fields, check_known, float_dtype, returns
from vit_jax.types import Params


class Rule(NamedTuple):
    """A direction of descent and, for rules that need them, transformations around it.

    Attributes:
      direction: the transformation of gradients that the learning rate and the decay follow.
      after_decay: a stateless transformation of direction plus decay, before the learning rate.
      around: `around(step, lr)` is given the whole step, a transformation whose updates are ready
        to be added to the parameters, and this step's learning rate, and returns what replaces it.
      evaluation_params: a function of `(state, params)` that returns the parameters to evaluate
        and publish, if they differ from those at which gradients are computed.
    """

    direction: optax.GradientTransformation
    after_decay: optax.GradientTransformation | None = None
    around: (
        Callable[[optax.GradientTransformation, jax.Array], optax.GradientTransformation] | None
    ) = None
    evaluation_params: Callable[[Any, Params], Params] | None = None

    def init(self, params: Params) -> Any:
        """Returns the state for `params` before the first update, independent of learning rates."""
        whole = self.around(self.direction, jnp.float32(0)) if self.around else self.direction
        return whole.init(params)


def load_rule(name: str, args: Mapping[str, Any], *, blocks: str) -> Rule:
    """Returns the rule `name` with arguments `args`. Raises `UserError` if either is invalid."""
    function = RULES.find(name, "config.optim.name")
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key in () if open_ended else args:
        check_known(key, parameters, f"config.optim.args.{key}", f"argument of {name}")
    check_fields(function, args, "config.optim.args.")
    for key, value in args.items():
        if key.endswith("dtype") and value is not None:
            float_dtype(f"config.optim.args.{key}", value)
    if "blocks" in parameters:
        args = {"blocks": blocks, **args}
    try:
        rule = function(**args)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.optim.args: {name} refuses {dict(args)}: {error}") from error
    if not isinstance(rule, Rule | optax.GradientTransformation):
        raise UserError(
            f"config.optim.name={name!r} is no optimizer: its result is of type"
            f" {type(rule).__name__}, not optax.GradientTransformation"
        )
    return rule if isinstance(rule, Rule) else Rule(rule)


def state_name(name: str) -> str:
    """Returns the key of the rule's state in the optimizer's state and in checkpoints."""
    return name.rpartition(":")[2]


def _of_optax() -> Mapping[str, Callable]:
    """Returns optax's functions `scale_by_NAME`, by NAME."""
    prefix = "scale_by_"
    return {
        name.removeprefix(prefix): getattr(package, name)
        for package in (optax.contrib, optax)
        for name in dir(package)
        if name.startswith(prefix)
    }


RULES = Kind(
    "optimizer",
    "vit_jax.optim.rules",
    accepts=returns(Rule, optax.GradientTransformation),
    others=_of_optax,
)
"""The finder of the rules that `config.optim.name` names."""
