"""The first state of a run, which may start from a checkpoint (`config.init`)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax import checkpoints
from vit_jax.checkpoints import MergeReport
from vit_jax.errors import UserError
from vit_jax.parallel import sharding
from vit_jax.training import step
from vit_jax.training.run import Run
from vit_jax.types import Params


def first_state(run: Run) -> tuple[step.State, MergeReport | None]:
    """Returns the state before the first step, and what became of `config.init.checkpoint`.

    Parameters that neither the checkpoint nor the task's `loaded_params` hold are initialized. The
    optimizer's state and the moving average start from the loaded parameters.

    Raises:
      UserError: the checkpoint cannot be read, or does not fit the model.
    """
    loaded, report = _load(run) if run.config.init.checkpoint else ({}, None)
    loaded = {**loaded, **run.task.loaded_params()}
    state = run.make_state()
    return (_restart(run, state, loaded) if loaded else state), report


def _load(run: Run) -> tuple[Params, MergeReport]:
    init, spec = run.config.init, run.task.info.spec
    height, width, channels = spec["image"].shape
    try:
        return checkpoints.load_with_report(
            init.checkpoint,
            run.task.model,
            image_size=(height, width),
            channels=channels,
            head=init.head,
            interpolation=init.interpolation,
            source_grid=tuple(init.source_grid) or None,
            initialise=tuple(init.initialise),
            ignore=tuple(init.ignore),
            seed=run.config.seed,
        )
    except UserError as error:
        raise UserError(f"config.init: {error}") from error


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

    def others(params: Params) -> tuple[Any, Params | None]:
        average = None if state.ema is None else jax.tree.map(jnp.copy, params)
        return run.optimizer.init(params), average

    wanted = (run.abstract.opt_state, run.abstract.ema)
    places = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    with sharding.activate(run.mesh):
        opt_state, ema = jax.jit(others, out_shardings=places)(params)
    return state.replace(params=params, opt_state=opt_state, ema=ema)
