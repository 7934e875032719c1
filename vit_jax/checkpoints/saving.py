"""Writes a model's parameters as other codebases' files, if these can express the model."""

import os

import flax.linen as nn
from etils import epath

from vit_jax import models
from vit_jax.checkpoints.formats import FORMATS, Format, ImageSize, checked_size
from vit_jax.errors import UserError
from vit_jax.types import Params


def save(
    params: Params,
    model: nn.Module,
    path: epath.PathLike,
    to: str,
    *,
    image_size: ImageSize = None,
) -> str:
    """Writes parameters in a checkpoint format; they appear whole or not at all.

    Args:
      to: "npz" (vision_transformer, names as in the published files), "big_vision" (`.npz`), "bit"
        (`.npz`), "timm" (`.safetensors`), "hf" (a directory for transformers), "open_clip" (a
        directory, of image-text models), "orbax" (a directory of this package, with the parameters
        alone), or `package.module:FORMAT` for a format of your own (see
        `vit_jax.checkpoints.formats.Format`).
      image_size: side of the images, or (height, width), where it cannot be told from a square
        grid of learned positions.

    Returns:
      What was written and the call that loads it, as text for a person.

    Raises:
      UserError: the format has no place for something in the model, named in the message, or
        `image_size` is neither a side nor a pair of sides.
    """
    target, size = FORMATS.find(to, "format"), checked_size(image_size)
    if target.write is None:
        raise UserError(f"format={to!r} is only read; {_others(model, to)}")
    if not os.fspath(path).endswith(target.ending):
        raise UserError(f"{path}: a file for {to} has a name that ends in {target.ending}")
    lacking = target.lacks(models.traits_of(model).all_named)
    if lacking:
        raise UserError(f"{to} has no place for {', '.join(lacking)}; {_others(model, to)}")
    return target.write(path, params, model, size)


def _others(model: nn.Module, to: str) -> str:
    """Returns a hint at the formats of this package that have a place for everything."""
    traits = models.traits_of(model).all_named
    found = [name for name in FORMATS.names() if name != to and _writes(name, traits)]
    return f"write --to={' or '.join(found)}"


def _writes(name: str, traits: frozenset[str]) -> bool:
    found: Format = FORMATS.find(name, "format")
    fits = "a text tower" in traits or not found.two_towers
    return found.write is not None and fits and not found.lacks(traits)
