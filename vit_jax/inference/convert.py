"""Converts checkpoints from any format to any other, and opens them with their model."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax import checkpoints, models, tasks
from vit_jax.checkpoints import loading
from vit_jax.checkpoints.fit.inference import infer_model, infer_towers
from vit_jax.checkpoints.fit.target import image_channels
from vit_jax.checkpoints.formats import FORMATS
from vit_jax.checkpoints.weights import POSITIONS, TEXT_HEAD, Weights
from vit_jax.errors import UserError
from vit_jax.training.workdir import Workdir
from vit_jax.types import Params

logger = logging.getLogger(__name__)


def run(
    src: str,
    dst: str,
    to: str,
    *,
    source_format: str = "",
    model: str | None = None,
    fields: Mapping[str, Any] | None = None,
    image_size: int | Sequence[int] | None = None,
) -> str:
    """Converts a checkpoint; returns a report and the call that loads the result.

    Args:
      src, dst, to: as `checkpoints.load` and `checkpoints.save` take them.
      source_format: the format of `src`, as `checkpoints.load` takes it.
      model, fields: name and fields of the model, where the file does not determine them; a workdir
        of this package determines all of them.
      image_size: resizes the position embeddings to this image size; None keeps them.

    Raises:
      UserError: the file cannot be read, its model cannot be inferred, or the format cannot express
        it. No parameter is initialized: a parameter that the file lacks is an error.
    """
    tower = "both" if FORMATS.find(to, "--to").two_towers else "image"
    weights = loading.read_weights(src, format=source_format, tower=tower)
    module = _whole_model(src, weights, model, dict(fields or {}))
    params, report = loading.fit(weights, module, src, image_size=image_size, take=True)
    if report.initialised:
        raise UserError(
            f"{src} is not of this model: {report.initialised[0]}; write the fields of the model it"
            " was trained as"
        )
    if len(report.ignored) > len(weights.ignored):
        raise UserError(
            f"{src} holds more than this model: {report.ignored[len(weights.ignored)]}; write the"
            " fields of the model it was trained as"
        )
    written = checkpoints.save(params, module, dst, to, image_size=image_size)
    return f"{report}\n{written}"


def open_model(
    src: str,
    *,
    model: str | None = None,
    fields: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    with_text: bool = False,
) -> tuple[nn.Module, Params, tuple[int, int, int]]:
    """Returns the model of a checkpoint, its parameters, and (height, width, channels) of images.

    Args:
      image_size: (height, width). None means the size that matches the checkpoint's position
        embeddings, or otherwise the size at which `model` is listed.
      with_text: whether the model is to be a `models.TwoTowers`, of a released image-text model;
        otherwise it is the image tower.

    Raises:
      UserError: the file cannot be read, or its model or image size cannot be inferred.
    """
    weights = loading.read_weights(src, tower="both" if with_text else "image")
    fields = dict(fields or {})
    module: nn.Module
    if with_text:
        module = infer_towers(weights, model, **fields).build()
    else:
        module = _model(src, weights, model, fields)
    size = image_size or _trained_size(src, weights, module, model)
    channels = image_channels(weights.arrays)
    hidden = weights.arrays.get("head/pre_logits/bias")
    params, report = loading.fit(weights, module, src, image_size=size, take=True)
    for note in report.notes:
        logger.warning("%s: %s", src, note)
    if hidden is not None and "pre_logits" not in params.get("head", {}):
        logger.warning(
            "%s: features are those before its representation layer; write"
            " --model.representation_size=%d for those behind it", src, hidden.size,
        )  # fmt: skip
    rows, columns = (size, size) if isinstance(size, int) else size
    return module, params, (rows, columns, channels)


def _trained_size(
    src: str, weights: Weights, module: nn.Module, name: str | None
) -> tuple[int, int]:
    table = weights.arrays.get(POSITIONS)
    stride = models.token_stride(models.backbone_of(module))
    if stride is None or (table is None and weights.grid is None):
        listed = models.find_variant(name).input_size if name else 0
        if not listed:
            raise UserError(f"{src} does not tell its image size; write --image-size")
        return listed, listed
    grid = weights.grid
    if grid is None:
        assert table is not None
        grid = _square(src, table.shape[1])
    rows, columns = grid
    return rows * stride[0], columns * stride[1]


def _square(src: str, tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)  # A class token adds one row to a square number of rows.
    if side * side not in (tokens, tokens - 1):
        raise UserError(f"{src} has {tokens} positions, no square; write --image-size")
    return side, side


def _model(src: str, weights: Weights, name: str | None, fields: dict[str, Any]) -> nn.Module:
    """Returns the backbone, with a classifier if the checkpoint has one."""
    run = None if name else Workdir.containing(src)
    if run:
        head = weights.arrays.get("head/bias")
        classes = {} if head is None else {"num_classes": head.shape[0]}
        return models.build(**{**classes, **run.read_config().model.to_dict(), **fields})
    return infer_model(weights, name, **fields)


def _whole_model(src: str, weights: Weights, name: str | None, fields: dict[str, Any]) -> nn.Module:
    """Returns the same as `_model`, or the run's task's model if its head is not a classifier."""
    run = None if name else Workdir.containing(src)
    if run and not all(array.startswith(("backbone/", "head/")) for array in weights.arrays):
        config = run.read_config()
        model = {**config.model.to_dict(), **fields}
        return tasks.build(config.task.to_dict(), model, run.read_info()).model
    if TEXT_HEAD in weights.arrays and not run:
        return infer_towers(weights, name, **fields).build()
    return _model(src, weights, name, fields)
