"""`vit_jax.train` and `vit_jax.evaluate`: what the commands of these names do, from Python."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.errors import UserError, quoted
from vit_jax.parallel import processes
from vit_jax.storage import path_text
from vit_jax.tracking.callbacks import Callbacks
from vit_jax.training import evaluate as evaluate_lib
from vit_jax.training import loop
from vit_jax.training.outcome import Outcome
from vit_jax.training.workdir import Workdir

_INSTEAD = {
    "step": "give workdir for a run, or the path of one checkpoint",
    "overrides": "change config itself",
    "trust": "the code that config names is trusted",
    "config": "change keys of the run with overrides",
}
"""What to write in place of an argument of `evaluate` that its model would not use."""


def train(
    config: ConfigDict | Mapping[str, Any] | str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    callbacks: Iterable[Any] = (),
    profile: str = "",
) -> Outcome:
    """Trains a model, or resumes the run in the workdir; a finished run returns at once.

        config = vit_jax.config.load("digits")
        config.optim.lr = 3e-4
        outcome = vit_jax.train(config, "runs/digits")
        outcome.results["test/accuracy"]

    Args:
      config: from `vit_jax.config.load` or `vit_jax.config.default_config`, also as nested
        dictionaries; or what `--config` takes, the name of a recipe or a file, with arguments after
        a colon.
      workdir: the folder of the run, local or on an object store. It is made if it does not exist.
      callbacks: objects with any of the methods `on_step`, `on_evaluate`, `on_save` and `on_end`;
        see `vit_jax.tracking.callbacks`.
      profile: the steps to trace, as `START:STOP`.

    Returns:
      An `Outcome` with the `results` of the last evaluation, numbers by `SPLIT/METRIC`; the
      `headline`, name and value of the metric that the run is judged by; the `seconds` by part of
      the run; and the path of the `report`.

    Raises:
      UserError: the config, the data, a callback or the workdir is wrong.
      Interrupted: Ctrl-C or SIGTERM arrived; the state has been saved, and the same call continues.
      Diverged: the loss or the gradient was not finite too often in a row.
      LostProcess: another process of the run ended; all may start again from the last checkpoint.
      CannotSave: storage failed in one of several processes; all may start again.
    """
    if not isinstance(callbacks, Iterable):
        raise UserError(f"callbacks={quoted(callbacks)}: write a list of objects")
    callbacks = tuple(callbacks)
    calls = Callbacks(callbacks)  # Checked before anything is read.
    config = _set_up(config)
    outcome = loop.train(config, workdir, profile=profile, callbacks=callbacks)
    calls("on_end", outcome)
    return outcome


def evaluate(
    workdir: str | os.PathLike = "",
    *,
    step: int | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    trust: Sequence[str] = (),
    config: ConfigDict | Mapping[str, Any] | str | os.PathLike | None = None,
    checkpoint: str | os.PathLike = "",
) -> dict[str, float]:
    """Returns exact metrics on the evaluation splits, `{"SPLIT/METRIC": value}`.

        vit_jax.evaluate("runs/digits")
        vit_jax.evaluate(config=config, checkpoint="B_16.npz")

    Args:
      workdir: a run that was trained.
      step: with `workdir`: the step whose checkpoint is evaluated, or "best" for the one that
        `config.checkpoint.keep_best` kept; None for the newest.
      overrides: with `workdir`: values, or the texts that stand for them, by the dotted key that
        they replace, such as `{"eval.batch_size": 256}`.
      trust: with `workdir`: names of code from outside this package, as in `my_tasks:Task`, that
        the run's config names and that may run.
      config, checkpoint: in place of `workdir`: a config as `train` takes it, and a checkpoint of
        any format for its model.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it does not fit the model; or an
        argument was given that goes only with the other kind of model.
    """
    if bool(workdir) == bool(checkpoint):
        raise UserError("evaluate: give workdir, or config and checkpoint")
    if checkpoint:
        _refuse("checkpoint", step=step, overrides=overrides, trust=trust)
        if config is None:
            raise UserError("evaluate: checkpoint needs config, which names the data")
        return evaluate_lib.evaluate_checkpoint(
            _set_up(config), path_text(checkpoint, "checkpoint")
        )
    _refuse("workdir", config=config)
    if not isinstance(overrides or {}, Mapping):
        raise UserError(f"overrides={quoted(overrides)}: write values by dotted key")
    run = Workdir.existing(path_text(workdir, "workdir"))
    _set_up(run.read_config(overrides, trust))
    return evaluate_lib.evaluate_workdir(run, overrides or {}, step, trust)


def _refuse(beside: str, **given: Any) -> None:
    """Raises a `UserError` for an argument that the model named by `beside` would not use."""
    for name, value in given.items():
        if value not in (None, "", (), [], {}):
            raise UserError(
                f"evaluate: {name} does not go with {beside}; {_INSTEAD[name]}, or leave it out"
            )


def _set_up(given: Any) -> ConfigDict:
    """Returns a complete config, and sets JAX up as it asks."""
    read = config_lib.load if isinstance(given, str | os.PathLike) else config_lib.validate
    config = read(given)
    processes.setup(config.compilation_cache, config.precision)
    return config
