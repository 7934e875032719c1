"""From a file of any known format to the parameters of a model."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax.checkpoints import array_files, files
from vit_jax.checkpoints.fit.merging import Merge, Options
from vit_jax.checkpoints.fit.report import MergeReport
from vit_jax.checkpoints.fit.target import Target, is_text
from vit_jax.checkpoints.formats import bit, hf, npz, orbax, timm
from vit_jax.checkpoints.weights import Weights, backbone_of, to_params
from vit_jax.errors import UserError
from vit_jax.types import Params


def load(
    path: epath.PathLike,
    model: nn.Module,
    *,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    **options: Any,
) -> Params:
    """Parameters for `model.apply({"params": params}, images)` from a checkpoint of any format.

    Args:
      path: a file or directory, local or behind an address that fsspec knows. The format is
        recognised by content: `.npz` of vision_transformer, big_vision or BiT, state dicts of timm
        and Hugging Face transformers (`.safetensors`; `.bin` and `.pth` where torch is installed),
        directories of Hugging Face, and our own workdirs and checkpoints.
      model: from `vit_jax.models.build`.
      image_size: side of the images in pixels, or (height, width), to which positions are resized;
        None keeps the checkpoint's positions.
      channels: of the images; None: as the checkpoint.
      head: "auto" keeps the classifier where it fits and starts it at zero where it does not;
        "keep" insists on keeping it; "zero" starts it anew.
      interpolation: of positions, see `surgery.resize_positions`.
      source_grid: (rows, columns) of the checkpoint's positions, where they make no square.
      initialise, ignore: regular expressions of whole names: parameters to start anew, and arrays
        of the file to leave out.
      seed: of what is initialised at random.

    Returns:
      Nested dictionaries of float32 NumPy arrays.

    Raises:
      UserError: the file cannot be read, or something in it, or missing from it, stays unexplained.
    """
    return load_with_report(path, model, image_size=image_size, channels=channels, **options)[0]


def load_with_report(
    path: epath.PathLike,
    model: nn.Module,
    *,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    **options: Any,
) -> tuple[Params, MergeReport]:
    """`load`, with an account of what was loaded, resized, initialised and ignored."""
    one = "text" if is_text(backbone_of(model)) else "image"
    weights = read_weights(path, tower="both" if hasattr(model, "text") else one)
    source = os.fspath(path)
    return fit(weights, model, source, image_size=image_size, channels=channels, **options)


def fit(
    weights: Weights,
    model: nn.Module,
    source: str,
    *,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    **options: Any,
) -> tuple[Params, MergeReport]:
    """Parameters of `model` from arrays that were read before; see `load`."""
    checked = Options(**options)
    weights = dataclasses.replace(weights, grid=checked.source_grid or weights.grid)
    target = Target.create(model, weights, image_size, channels)
    arrays, report = Merge(weights, target, checked, source).run()
    return to_params(arrays, model, stacked=target.stacked), report


def read_weights(path: epath.PathLike, *, tower: str = "image") -> Weights:
    """A checkpoint's arrays under our names. `tower`: of an image-text model, see `npz.read`."""
    name = os.fspath(path)
    if "://" not in name or name.startswith(files.STORES):
        place = epath.Path(path).expanduser()
        try:
            exists, is_directory = place.exists(), place.is_dir()
        except Exception as error:
            if "://" not in name:
                raise
            raise UserError(f"cannot read {name}: {files.first_line(error)}") from error
        if not exists:
            raise UserError(f"there is no checkpoint {name}")
        if is_directory:
            # Orbax takes no relative paths; addresses of object stores are absolute as they are.
            return _read_directory(place if "://" in name else place.resolve())
        path = place
    return recognise(array_files.read_arrays(path), path, tower=tower)


def recognise(
    arrays: Mapping[str, np.ndarray], path: epath.PathLike, *, tower: str = "image"
) -> Weights:
    """Arrays of a file under our names, by what theirs look like."""
    if bit.matches(arrays):
        return bit.read(arrays)
    if npz.matches(arrays):
        return npz.read(arrays, tower)
    for state_dict in (timm, hf):
        if state_dict.matches(arrays):
            return state_dict.read(arrays)
    raise UserError(f"{path}: arrays such as {min(arrays)!r} are of no format known here")


def _read_directory(path: epath.Path) -> Weights:
    found = orbax.find(path)
    if found:
        return orbax.read(*found)
    if hf.is_directory(path):
        return hf.read_directory(path)
    raise UserError(
        f"{path} is a directory without a checkpoint: no steps of ours, and no config.json with"
        " model.safetensors of Hugging Face"
    )
