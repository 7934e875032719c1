"""Lists the models that have names, and the weights of them that others have published."""

import fnmatch
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import NamedTuple

from vit_jax.errors import UserError, quoted
from vit_jax.models import hub, timm_names
from vit_jax.models.cost import flops, param_count
from vit_jax.models.registry import build, find, find_variant, names, variants


class Row(NamedTuple):
    """A named model, with the head of its published weights, or else a head for 1000 classes.

    Text towers and backbones have no head.

    params: the number of parameters.
    gflops: 1e9 operations of the forward pass of one input; a multiply-add counts as 2.
    input_size: the side of the image in pixels; for text, the number of tokens.
    """

    name: str
    params: int
    gflops: float
    input_size: int


class Pretrained(NamedTuple):
    """Weights that others have published, with their own head.

    name: what `build` and `checkpoints.load` take. params, gflops, input_size: as in `Row`.
    license: as timm states it. origin: the address of the files.
    """

    name: str
    params: int
    gflops: float
    input_size: int
    license: str
    origin: str


class Size(NamedTuple):
    """The side of the images of a model, None if it is not known, and its number of classes."""

    input_size: int | None
    num_classes: int | None
    license: str = ""


SEE_CARD = "see its card"

_TRAINED_AT = {"facebook/dinov2": 518}
"""The sides of images in pixels of models of the hub whose names tell none, and are not 224."""


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Returns the sorted names of the models that match a pattern, such as `vit_s*`.

    `*` stands for any text and `?` for one character. The list is empty if no name matches.

    Args:
      pretrained: lists the names of weights that others have published on the Hugging Face hub, for
        `vit_jax.build(name, pretrained=True)`. The pattern may match any part of such a name:
        `dinov3` finds `facebook/dinov3-vits16-pretrain-lvd1689m`.

    Raises:
      UserError: the pattern is no text.
    """
    if not isinstance(pattern, str):
        raise UserError(f"list_models: pattern={quoted(pattern)}: write a text, such as 'vit_s*'")
    if pretrained:
        return [model.name for model in published(pattern)[0]]
    return [name for name in names() if fnmatch.fnmatchcase(name, pattern)]


def rows(only: Sequence[str] | None = None) -> Iterator[Row]:
    """Yields a row for every model with a name of this package, or for those in `only`.

    A model whose counts are not stored is traced. Models with required fields, such as plain `vit`,
    have no size and no row.

    Raises:
      UserError: there is no model of such a name.
    """
    for name in _ours() if only is None else only:
        key = find(name)
        size = _size(key)
        if size.input_size is not None:
            yield Row(name, *_counts(key, size), size.input_size)


def published(pattern: str = "*") -> tuple[list[Pretrained], dict[str, str]]:
    """Returns published weights whose names contain a pattern, such as `dinov2`.

    Returns:
      A row for each name of a model that this package has, sorted by name; and for each name of a
      model that it has not, the reason.
    """
    found, left_out = [], {}
    for name, size in sorted(_published().items()):
        if fnmatch.fnmatchcase(name, f"*{pattern}*"):
            try:
                counts = _counts(name, size)
            except UserError as error:
                left_out[name] = str(error)
                continue
            assert size.input_size is not None
            found.append(Pretrained(name, *counts, size.input_size, size.license, f"hf://{name}"))
    return found, left_out


@functools.cache
def _published() -> Mapping[str, Size]:
    """Returns all published weights by name."""
    found = {}
    for architecture, row in timm_names.table().items():
        for tag, (side, classes, stated) in row["tags"].items():
            found[f"timm/{architecture}.{tag}"] = Size(side, classes, stated or SEE_CARD)
    for name in hub.VARIANTS:
        told = re.search(r"-(\d{3})(?![\dm])", name)
        others = (side for start, side in _TRAINED_AT.items() if name.startswith(start))
        found[name] = Size(int(told[1]) if told else next(others, 224), 0, SEE_CARD)
    return found


def _size(name: str) -> Size:
    """Returns the size of a model; an architecture of timm has that of its first weights."""
    timm_name = name if name.startswith("timm/") else f"timm/{name}"
    for known, size in _published().items():
        if known in (name, timm_name) or known.startswith(f"{timm_name}."):
            return size
    variant = find_variant(name)
    return Size(variant.input_size, variant.num_classes)


def _counts(name: str, size: Size) -> tuple[int, float]:
    """Returns the parameters and GFLOPs of a model, which is traced if they are not stored."""
    params, operations = stored_counts().get(name) or traced_counts(name, size)
    return params, operations / 1e9


@functools.cache
def stored_counts() -> Mapping[str, Sequence[int]]:
    """Returns the parameters and operations by name, as `scripts/model_counts.py` stored them."""
    return json.loads(resources.files("vit_jax.models").joinpath("counts.json").read_text())


def traced_counts(name: str, size: Size) -> tuple[int, int]:
    """Returns the parameters and operations of a model, which takes seconds."""
    assert size.input_size is not None
    model = build(name, num_classes=size.num_classes)
    return param_count(model, size.input_size), flops(model, size.input_size)


def sizes() -> dict[str, Size]:
    """Returns the size of every model that has a row in one of the lists."""
    return {name: _size(name) for name in _ours()} | dict(_published())


def _ours() -> list[str]:
    """Returns the names of this package alone that stand for complete models."""
    return [name for name in names() if variants()[name].input_size is not None]
