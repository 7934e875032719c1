"""Finds the parameters of our checkpoints to use: those that the run's evaluation reads.

A moving average, or a teacher of the task's own, where the run kept one; else what the optimizer
makes of the parameters it trains, for rules such as Schedule-Free that take gradients at one place
and average another.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from etils import epath

from vit_jax.checkpoints import files
from vit_jax.checkpoints.store import Store, flatten
from vit_jax.config import check_trust
from vit_jax.errors import UserError
from vit_jax.models.published import TEACHER
from vit_jax.optim import DEFAULTS
from vit_jax.optim.rule import Rule, load_rule, state_name
from vit_jax.types import Array

MANIFEST = "manifest/metadata"
_STATE = "opt_state"
_TASK_STATE = "task_state"

_Shapes = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Published:
    """params: by dotted name. metadata: the checkpoint's. note: what was averaged, if anything."""

    params: Mapping[str, Array]
    metadata: Any
    note: str = ""


def read(directory: epath.Path, step: int, place: jax.sharding.Sharding) -> Published:
    """The parameters of a step to evaluate and publish, on `place`.

    Raises:
      DamagedError: a file is missing, cut short or changed.
      UserError: the checkpoint holds no parameters, or its description is broken.
    """
    path = directory / str(step)
    manifest = files.read_json(path / MANIFEST)
    described = manifest.get("arrays")
    if not isinstance(described, dict):
        raise UserError(f"{path / MANIFEST} does not describe a checkpoint")
    with files.reading(path / MANIFEST):
        saved = {
            name: jax.ShapeDtypeStruct(tuple(x["shape"]), np.dtype(x["dtype"]), sharding=place)
            for name, x in described.items()
        }
    ema, params = _below("ema", saved), _below("params", saved)
    teacher = _below(f"{_TASK_STATE}.{TEACHER}", saved)
    if not (ema or params):
        raise UserError(f"{path} holds no parameters")
    store, metadata = Store(directory), manifest.get("metadata")
    if teacher:
        found = store.restore(step, {_TASK_STATE: {TEACHER: teacher}}).tree[_TASK_STATE][TEACHER]
        return Published(found, metadata, "the teacher, which averages the parameters")
    if ema:
        found = store.restore(step, {"ema": ema}).tree["ema"]
        return Published(found, metadata, "the moving average of the parameters (ema)")
    name, rule = _rule(directory, saved)
    if rule is None or rule.evaluation_params is None:
        return Published(store.restore(step, {"params": params}).tree["params"], metadata)
    state = _state(rule, params, _below(f"{_STATE}.{name}", saved), place)
    restored = store.restore(step, {"params": params, _STATE: {name: state.abstract}})
    params, state_found = restored.tree["params"], restored.tree[_STATE][name]
    trained = {name: params[name] for name in state.trained}
    averaged = flatten(rule.evaluation_params(state_found, _nested(trained)))
    return Published({**params, **averaged}, metadata, f"the parameters that {name} averages")


def _below(prefix: str, saved: _Shapes) -> _Shapes:
    start = f"{prefix}."
    return {name.removeprefix(start): x for name, x in saved.items() if name.startswith(start)}


def _rule(directory: epath.Path, saved: Iterable[str]) -> tuple[str, Rule | None]:
    """Returns the optimizer's name in the checkpoint and its rule.

    The rule is that of the run's config or, where a checkpoint lies alone, the one of the state's
    name. It is None where only parameters were saved, or where the rule is code of somebody's that
    cannot be imported: the parameters are then used as they were trained.

    Raises:
      UserError: the rule is code of somebody's that the user has not named.
    """
    names = {name.split(".")[1] for name in saved if name.startswith(f"{_STATE}.")}
    if not names:
        return "", None
    config = directory.parent / "config.json"
    given = files.read_json(config)["config"]["optim"] if config.exists() else {"name": min(names)}
    keys = {**DEFAULTS, **given}
    check_trust({"optim": {"name": keys["name"]}}, str(config))
    name = state_name(keys["name"])
    try:
        return name, load_rule(keys["name"], keys["args"], blocks=keys["blocks"])
    except UserError:
        return name, None


@dataclasses.dataclass(frozen=True)
class _State:
    """abstract: shapes of a rule's state. trained: names of the parameters that it is about."""

    abstract: Any
    trained: tuple[str, ...]


def _state(rule: Rule, params: _Shapes, saved: _Shapes, place: jax.sharding.Sharding) -> _State:
    """The state of a rule as it was saved: frozen parameters have none."""

    def init(names: Iterable[str]) -> Any:
        return jax.eval_shape(rule.init, _nested({name: params[name] for name in names}))

    frozen = {_owner(name, params) for name in flatten(init(params)).keys() - saved.keys()}
    trained = tuple(name for name in params if name not in frozen)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), init(trained)
    )
    return _State(abstract, trained)


def _owner(name: str, params: _Shapes) -> str | None:
    """The parameter that a copy in the state belongs to: the path of the copy ends in its path."""
    parts = name.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in params), None)


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(dict(named), sep=".")
