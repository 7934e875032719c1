"""The form in which every checkpoint passes between a file and a model."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from vit_jax import models
from vit_jax.checkpoints.file_array import Stack, stack
from vit_jax.errors import UserError
from vit_jax.types import Params

Arrays = dict[str, np.ndarray]

CLS = "backbone/cls"
POSITIONS = "backbone/pos_embed"
PATCHES = "backbone/patch_embed/kernel"
DECODER = "decoder/"
DECODED = f"{DECODER}pos_embed"
"""The fixed table of positions of a masked autoencoder's decoder."""
TOKEN_MIXING = "backbone/blocks_0/token_mixing/dense1/kernel"
TEXT_HEAD = "text_proj/kernel"
"""An array that every model of two towers has, and no other model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Arrays under our names, whatever file they came from.

    arrays: float32 by path. The backbone's paths start with `backbone/`, the head's with `head/`,
      those of an image-text model's other parts as in `models.TwoTowers`;
      blocks are numbered (`backbone/blocks_3/norm1/scale`), never stacked. Attention kernels of
      formats that do not tell the number of heads are matrices.
    format: the naming, in words, for messages.
    class_row: whether the position table has a row for the class token; None where unknown.
    grid: (rows, columns) of the patches in that table; None where unknown.
    ours: written by this package, so that a table as large as the model's is made like it.
    ignored: names in the file that no model needs, with the reason.
    unknown: names in the file that have no meaning here.
    notes: how the file's own model differs from ours in what arrays do not show.
    interpolation: the resizing of positions that the codebase of the file uses; see
      `surgery.resize_positions`. keeps_aspect: see there.
    fields: fields of the model that the file or its config tells, and arrays do not show.
    text_fields: those of the text tower beside it; {} where there is none, or nothing is told.
    detector: those of `models.Detector`, where that is the model's head.
    bias_interpolation: the resizing of tables of relative positions; see `surgery.resize_bias`.
    """

    arrays: Arrays
    format: str
    class_row: bool | None = None
    grid: tuple[int, int] | None = None
    ours: bool = False
    ignored: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    interpolation: str = "corners"
    keeps_aspect: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    detector: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bias_interpolation: str = "geometric"


PARTS = {
    "backbone": ("image", "backbone"),
    "image_proj": ("image", "head"),
    "decoder": ("image", "decoder"),
    "text": ("text", "backbone"),
    "text_proj": ("text", "head"),
}
"""For each part of `models.TwoTowers` and `models.OpenVocabularyDetector`: its tower, and its name
in a model of that tower alone."""


def join_towers(image: Weights, text: Weights, between: Mapping[str, np.ndarray]) -> Weights:
    """Returns the weights of `models.TwoTowers` from those of its towers.

    between: the arrays outside both towers, under our names.
    """
    alone = {"image": image.arrays, "text": text.arrays}
    found = {
        ours + name.removeprefix(part): array
        for ours, (tower, part) in PARTS.items()
        for name, array in alone[tower].items()
        if name.startswith(f"{part}/")
    }
    return dataclasses.replace(
        image,
        arrays={**found, **between},
        format=f"{image.format} with the text tower of {text.format}",
        ignored=(*image.ignored, *text.ignored),
        unknown=(*image.unknown, *text.unknown),
        notes=(*image.notes, *text.notes),
        text_fields=text.fields,
    )


def split_towers(arrays: Mapping[str, np.ndarray]) -> dict[str, Arrays]:
    """Returns the arrays of the "image" and the "text" tower, the inverse of `join_towers`.

    Their names are those of a model of that tower alone.
    """
    alone: dict[str, Arrays] = {"image": {}, "text": {}}
    for name, array in arrays.items():
        ours, _, rest = name.partition("/")
        if ours in PARTS:
            tower, part = PARTS[ours]
            alone[tower][f"{part}/{rest}"] = array
    return alone


def add(arrays: Arrays, name: str, array: np.ndarray, origin: str) -> None:
    """Adds an array under our name. Arrays that share a name, as tied ones do, must be equal.

    origin: the name of the array in its file, for the message.

    Raises:
      UserError: the values of another array have the name already.
    """
    if name in arrays and not np.array_equal(arrays[name], array):
        raise UserError(
            f"{origin}: two arrays of the checkpoint stand for {name}, with different values;"
            " remove one of them"
        )
    arrays.setdefault(name, array)


class Renames:
    """A table of names in two worlds, read in either direction; the first match wins.

    Each pair is (theirs, ours), paths up to any component; `{i}` stands for a number. What follows
    is carried over. Reading, several of theirs may lead to one of ours; writing takes the first.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        pairs = list(pairs)
        self._to_ours = [(_pattern(theirs), ours) for theirs, ours in pairs]
        self._to_theirs = [(_pattern(ours), theirs) for theirs, ours in pairs]

    def to_ours(self, name: str) -> str | None:
        """Our name for theirs, or None."""
        return _rename(name, self._to_ours)

    def to_theirs(self, name: str) -> str | None:
        """Their name for ours, or None."""
        return _rename(name, self._to_theirs)


def _pattern(template: str) -> re.Pattern[str]:
    body = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(template))
    return re.compile(rf"{body}(?P<rest>/.*)?")


def _rename(name: str, table: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in table:
        match = pattern.fullmatch(name)
        if match:
            groups = match.groupdict()
            return template.format(**groups) + (groups["rest"] or "")
    return None


def from_params(params: Params, model: nn.Module) -> Arrays:
    """Returns a model's parameters as `Weights.arrays`."""
    host = jax.tree.map(lambda x: np.asarray(x, np.float32), nn.meta.unbox(params))
    return canonical(host, model)


def canonical(tree: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Returns a nested tree flat, with blocks numbered and the backbone below `backbone/`."""
    if not models.has_head(model):
        tree = {"backbone": tree}
    return flax.traverse_util.flatten_dict(models.unstack_blocks(tree), sep="/")


def count_blocks(names: Iterable[str]) -> int:
    """Returns the depth of the encoder whose parameters have these names."""
    numbers = {m[1] for n in names if (m := re.match(r"backbone/blocks_(\d+)/", n))}
    return len(numbers)


def to_params(
    arrays: Arrays, model: nn.Module, *, stacked: Collection[str], lazy: bool = False
) -> Params:
    """Returns the tree of which `from_params` makes `arrays`.

    The arrays are taken out of the dictionary, so that blocks and their stacks are not both held
    in memory. stacked: the towers that scan over their blocks. lazy: whether large arrays may stay
    in their file; see `FileArray` and `Stack`.
    """
    flat: dict[str, Any] = {}
    stacks: dict[str, dict[int, Any]] = {}
    for name in list(arrays):
        block = re.fullmatch(r"(.*/)blocks_(\d+)/(.*)", name)
        if block and name.partition("/")[0] in stacked:
            path = f"{block[1]}blocks/{block[3]}"
            stacks.setdefault(path, {})[int(block[2])] = arrays.pop(name)
        else:
            array = arrays.pop(name)
            flat[name] = array if lazy else np.asarray(array)
    for path in list(stacks):
        blocks = stacks.pop(path)
        parts = [blocks.pop(number) for number in range(len(blocks))]
        flat[path] = Stack(parts) if lazy else stack(parts)
    tree = flax.traverse_util.unflatten_dict(flat, sep="/")
    return tree if models.has_head(model) else tree["backbone"]


def map_blocks(
    arrays: Mapping[str, np.ndarray], prefix: str, rename: Callable[[int], str]
) -> dict[str, np.ndarray]:
    """Splits arrays below `prefix`, stacked along their first axis, into one a block."""
    out: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if not name.startswith(prefix + "/") or not array.ndim:
            add(out, name, array, name)
            continue
        rest = name.removeprefix(prefix)
        for number, layer in enumerate(array):
            add(out, rename(number) + rest, layer, name)
    return out
