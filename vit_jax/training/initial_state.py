"""The initial state of a run, which may start from a checkpoint (`config.init`)."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax import checkpoints
from vit_jax.checkpoints import MergeReport
from vit_jax.errors import UserError
from vit_jax.parallel import sharding
from vit_jax.training import step
from vit_jax.training.class_names import class_names
from vit_jax.training.class_rows import by_name
from vit_jax.training.learned import Learned, warn_of_other_statistics
from vit_jax.training.run import Run
from vit_jax.training.spikes import LossHistory
from vit_jax.types import Params


def first_state(run: Run) -> tuple[step.State, MergeReport | None]:
    """Returns the state before the first step, and the account of `config.init.checkpoint`.

    Parameters that neither the checkpoint nor the task's `loaded_params` hold are initialized. The
    optimizer's state, the moving average and the task's state start from the loaded parameters.

    Raises:
      UserError: the checkpoint cannot be read, or does not fit the model.
    """
    loaded, report = _load(run) if run.config.init.checkpoint else ({}, None)
    _check_teacher(run)
    loaded = {**loaded, **run.task.loaded_params()}
    state = run.make_state()
    return (_restart(run, state, loaded) if loaded else state), report


def _check_teacher(run: Run) -> None:
    """Raises a `UserError` if the teacher of a distillation was trained for other classes.

    Other statistics than the task's are warned of.
    """
    teacher = (run.config.task.get("distill") or {}).get("checkpoint", "")
    if not teacher:
        return
    if change := Learned.of(teacher).change(class_names(run.task)):
        raise UserError(f"config.task.distill: the teacher was trained for other classes: {change}")
    warn_of_other_statistics(run.task, teacher)


def _load(run: Run) -> tuple[Params, MergeReport]:
    """Loads `config.init.checkpoint` and gives each class the row of the head with its name."""
    init = run.config.init
    try:
        params, report = _load_with_head(run, init.head)
        warn_of_other_statistics(run.task, init.checkpoint)
        if init.head == "zero":
            return params, report
        learned, names = Learned.of(init.checkpoint), class_names(run.task)
        if len(learned.names) != len(names) or not learned.change(names):
            return params, report
        fresh, _ = _load_with_head(run, "zero")
        return by_name(run.task, learned.names, params, fresh, report, keep=init.head == "keep")
    except UserError as error:
        raise UserError(f"config.init: {error}") from error


def _load_with_head(run: Run, head: str) -> tuple[Params, MergeReport]:
    init = run.config.init
    height, width, channels = run.task.image_spec.shape
    return checkpoints.load_with_report(
        init.checkpoint,
        run.task.model,
        image_size=(height, width),
        channels=channels,
        head=head,
        interpolation=init.interpolation,
        source_grid=tuple(init.source_grid) or None,
        initialise=tuple(init.initialize),
        ignore=tuple(init.ignore),
        seed=run.config.seed,
        lazy=True,
    )


def _restart(run: Run, state: step.State, loaded: Mapping[str, Any]) -> step.State:
    """Returns `state` with the loaded parameters, each placed as the run shards it."""
    abstract = {name: run.abstract.params.get(name) for name in loaded}
    shapes = [jax.tree.map(lambda leaf: tuple(leaf.shape), tree) for tree in (abstract, loaded)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"config.init.checkpoint: task {run.config.task.name!r} trains other parameters than"
            " those of its model, so it cannot start from a checkpoint"
        )
    params = {**state.params, **jax.tree.map(sharding.place_whole, loaded, abstract)}
    return state.replace(params=params, **derived(run, params, DERIVED))


DERIVED = ("opt_state", "ema", "losses", "task_state")
"""The fields of a state whose first values follow from the parameters."""


def derived(run: Run, params: Params, fields: Collection[str]) -> dict[str, Any]:
    """Returns the values of some `DERIVED` fields before the first step from `params`."""

    def values(params: Params) -> dict[str, Any]:
        makers: dict[str, Callable[[], Any]] = {
            "opt_state": lambda: run.optimizer.init(params),
            "ema": lambda: jax.tree.map(jnp.copy, params),
            "losses": LossHistory.empty,
            "task_state": lambda: step.first_task_state(run.task, params, run.config.seed),
        }
        return {name: makers[name]() for name in places}

    abstract = {name: getattr(run.abstract, name) for name in fields}
    places = {
        name: jax.tree.map(lambda leaf: leaf.sharding, shapes)
        for name, shapes in abstract.items()
        if shapes is not None
    }
    with sharding.activate(run.mesh):
        return jax.jit(values, out_shardings=places)(params)
