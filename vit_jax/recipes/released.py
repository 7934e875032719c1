"""A released model with a new classifier, which the recipes of transfer start from."""

import os
from typing import Any

from vit_jax import checkpoints
from vit_jax.checkpoints import hub, input_spec


def normalize_as_told(config: Any, checkpoint: str) -> input_spec.InputSpec | None:
    """Sets `config.task.mean` and `std` to those beside a checkpoint; returns what stands there."""
    told = input_spec.read(checkpoint) if checkpoint else None
    if told:
        config.task.update(mean=list(told.mean), std=list(told.std))
    return told


def classifier_of(config: Any, model: str, checkpoint: str = "") -> None:
    """Sets `config.model`, `config.task` and `config.init` to a released model with a new head.

    What the files beside the checkpoint tell of its images becomes `config.task.mean` and `std`.

    Args:
      config: the config of a recipe, which is changed in place.
      model: the name of a model, a name of the Hugging Face hub, or a folder of such a model. The
        last two are the checkpoint, too, unless `checkpoint` names another.
      checkpoint: where the parameters are. If `model` names none either, `config.init.checkpoint`
        stays empty.
    """
    is_folder = os.path.isdir(os.path.expanduser(model))
    checkpoint = checkpoint or (model if is_folder else hub.address_of(model))
    if is_folder:
        config.model = checkpoints.model_config(model)
    else:
        config.model = {"name": model} | checkpoints.pooling_of(checkpoint)
    config.task = {"name": "classification"}
    normalize_as_told(config, checkpoint)
    config.init.checkpoint, config.init.head = checkpoint, "zero"
