"""Loads a checkpoint of any known format into the parameters of a model."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from etils import epath

from vit_jax import models, storage
from vit_jax.checkpoints import files
from vit_jax.checkpoints.fit.inference import TowersConfig, infer_config, infer_towers
from vit_jax.checkpoints.fit.merging import Merge
from vit_jax.checkpoints.fit.options import Options
from vit_jax.checkpoints.fit.report import MergeReport
from vit_jax.checkpoints.fit.target import Target
from vit_jax.checkpoints.formats import FORMATS, Format, checked_size
from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import Weights, to_params
from vit_jax.errors import UserError
from vit_jax.types import Params

TOKENS = ("pooling", "class_token", "class_token_position")


def load(
    path: epath.PathLike,
    model: nn.Module,
    *,
    format: str = "",
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    **options: Any,
) -> Params:
    """Reads parameters for `model.apply({"params": params}, images)` from a checkpoint.

    Args:
      path: a file or directory, local or behind an address that fsspec knows. The format is
        recognized by content: `.npz` of vision_transformer, big_vision or BiT, state dicts of timm
        and Hugging Face transformers (`.safetensors`, `.bin`, `.pth`), their directories, and
        workdirs and checkpoints of this package.
      model: from `vit_jax.models.build`.
      format: the name of the format, or `package.module:FORMAT` for one of your own; "" recognizes
        it.
      image_size: side of the images in pixels, or (height, width), to which positions are resized;
        None keeps the checkpoint's positions.
      channels: of the images; None: as the checkpoint.
      head: "auto" keeps the classifier where it fits and starts it at zero where it does not;
        "keep" insists on keeping it; "zero" starts it anew.
      interpolation: of positions, see `surgery.resize_positions`; "auto" is that of the codebase
        that the checkpoint is from.
      source_grid: (rows, columns) of the checkpoint's positions, where they make no square.
      initialise, ignore: regular expressions of whole names: parameters to start anew, and arrays
        of the file to leave out.
      seed: of what is initialised at random.

    Returns:
      Nested dictionaries of float32 NumPy arrays.

    Raises:
      UserError: the file cannot be read, or something in it, or missing from it, stays unexplained.
    """
    params, _ = load_with_report(
        path, model, format=format, image_size=image_size, channels=channels, **options
    )
    return params


def load_with_report(
    path: epath.PathLike,
    model: nn.Module,
    *,
    format: str = "",
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    lazy: bool = False,
    **options: Any,
) -> tuple[Params, MergeReport]:
    """Does as `load`, and reports what was loaded, resized, initialized and ignored.

    lazy: whether large arrays of `.safetensors` files may stay there until they are sliced or given
      to NumPy, so that each device reads its part; see `vit_jax.parallel.sharding.place_whole`.
    """
    tower = "text" if models.traits_of(model).reads_text else "image"
    if models.text_tower_of(model) is not None:
        tower = "both"
    weights = read_weights(path, format=format, tower=tower)
    return fit(
        weights,
        model,
        os.fspath(path),
        image_size=image_size,
        channels=channels,
        take=True,
        lazy=lazy,
        **options,
    )


def fit(
    weights: Weights,
    model: nn.Module,
    source: str,
    *,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    take: bool = False,
    lazy: bool = False,
    **options: Any,
) -> tuple[Params, MergeReport]:
    """Returns parameters of `model` from arrays that were read before; see `load_with_report`.

    take: whether to empty `weights.arrays`, for a caller that needs them no more. Memory then holds
      each array once, where blocks and their stacks would be held side by side.
    """
    checked = Options(**options)
    weights = dataclasses.replace(weights, grid=checked.source_grid or weights.grid)
    target = Target.create(model, weights, checked_size(image_size), channels)
    arrays, report = Merge(weights, target, checked, source).run()
    if take:
        weights.arrays.clear()
    return to_params(arrays, model, stacked=target.stacked, lazy=lazy), report


def read_weights(path: epath.PathLike, *, format: str = "", tower: str = "image") -> Weights:
    """Returns a checkpoint's arrays under the names of this package.

    format: its name; "" recognizes it. tower: see `Source`.
    """
    with Source.open(path, tower) as source:
        found: Format = FORMATS.find(format, "format") if format else recognize(source)
        with files.reading(f"{source.path} ({found.label})"):
            return found.read(source)


def model_config(path: epath.PathLike) -> dict[str, Any]:
    """Returns the section `config.model` that describes the backbone of a checkpoint.

    Raises:
      UserError: the checkpoint cannot be read, or does not tell all fields of its model.
    """
    with Source.open(path) as source:
        found = recognize(source).model_config(source)
    if found is None:
        found = infer_config(read_weights(path))
    head = ("num_classes", "representation_size")
    return {key: value for key, value in found.items() if key not in head and value is not None}


def pooling_of(path: epath.PathLike) -> dict[str, Any]:
    """Returns the fields of `config.model` that a checkpoint's folder tells of tokens and pooling.

    For recipes that name a model and a checkpoint beside it. A file of weights tells no fields, and
    neither does what is not there, so that a recipe can be read and planned before its checkpoint
    exists: {}. See `model_config` for errors.
    """
    name = os.fspath(path)
    if name.endswith(".npz") or (storage.is_remote(name) and not name.startswith(files.STORES)):
        return {}
    if not name or not epath.Path(name).expanduser().is_dir():
        return {}
    told = model_config(path)
    return {key: told[key] for key in TOKENS if key in told}


def towers_config(path: epath.PathLike) -> TowersConfig:
    """Returns the image-text model that a folder of transformers or open_clip holds.

    Raises:
      UserError: the checkpoint cannot be read, or has no two towers that it describes.
    """
    return infer_towers(read_weights(path, tower="both"))


def recognize(source: Source) -> Format:
    """Returns the format of this package that a checkpoint is in.

    Raises:
      UserError: it is in none of them.
    """
    for name in FORMATS.names():
        found: Format = FORMATS.find(name, "format")
        if found.matches(source):
            return found
    if source.folder is None:
        first = min(source.names, default="none at all")
        raise UserError(f"{source.path}: arrays such as {first!r} are of no format known here")
    raise UserError(
        f"{source.path} is a directory without a checkpoint: no steps of ours, and no config.json"
        " with model.safetensors of Hugging Face"
    )
