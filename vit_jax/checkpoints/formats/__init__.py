"""Checkpoint formats: one public module for each, with an object `FORMAT`.

A new format is one new file here. A format of somebody else is named `package.module:NAME`, where
`convert` and `checkpoints.load` and `save` take the name of a format.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import Weights
from vit_jax.errors import UserError, quoted
from vit_jax.plugins import Kind
from vit_jax.types import Params

ImageSize = int | Sequence[int] | None

Write = Callable[[epath.PathLike, Params, nn.Module, ImageSize], str]


def checked_size(size: Any) -> int | tuple[int, int] | None:
    """Returns the size of images in plain integers, None for None.

    Raises:
      UserError: `size` is neither a side in pixels nor (height, width).
    """
    if size is None:
        return None
    plain = size.tolist() if isinstance(size, np.ndarray | np.generic) else size
    sides = plain if isinstance(plain, list | tuple) else (plain, plain)
    if len(sides) != 2 or not all(_is_side(side) for side in sides):
        raise UserError(f"image_size={quoted(size)}: write a side in pixels, or (height, width)")
    return (int(sides[0]), int(sides[1])) if sides is plain else int(sides[0])


def _is_side(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) > 0


def _unknown(source: Source) -> None:
    """Returns None: the arrays of most formats, or the files beside them, tell their model."""
    del source


@dataclasses.dataclass(frozen=True)
class Format:
    """One checkpoint format.

    Attributes:
      label: the format in words, for messages.
      matches: returns whether a source is in this format, by the names of its arrays or files.
      read: returns the weights of a source. Any exception other than a `UserError` is taken for
        damage of the source, and becomes one.
      write: writes the parameters of a model to a path, whole or not at all, and returns a text
        that tells a person how to load them; None for a format that is only read. The image size,
        a side or (height, width), is None where the model's positions tell it.
      expresses: the traits (`vit_jax.models.Traits.all_named`) that the format has a place for;
        None for all.
      alternatives: further sets of traits, where a format has several kinds of models, one of which
        must have a place for everything.
      two_towers: whether every model that the format has is of images and texts, so that `convert`
        reads both towers of a file for it.
      ending: how the names of its files end; "" for folders.
      model_config: returns the section `config.model` of the run that a source is of, None where
        there is none. For formats whose arrays alone do not tell their model.
    """

    label: str
    matches: Callable[[Source], bool]
    read: Callable[[Source], Weights]
    write: Write | None = None
    expresses: frozenset[str] | None = frozenset()
    alternatives: tuple[frozenset[str], ...] = ()
    two_towers: bool = False
    ending: str = ""
    model_config: Callable[[Source], Mapping[str, Any] | None] = _unknown

    def lacks(self, traits: frozenset[str]) -> list[str]:
        """Returns those of the traits that the format has no place for."""
        if self.expresses is None:
            return []
        kinds = (self.expresses, *self.alternatives)
        return min((sorted(traits - kind) for kind in kinds), key=len)


FORMATS = Kind(
    "checkpoint format",
    __name__,
    attribute="FORMAT",
    form="package.module:FORMAT",
    accepts=lambda found: isinstance(found, Format),
)
