"""The tables that `python -m vit_jax models` prints."""

import fnmatch
import functools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vit_jax.errors import UserError
from vit_jax.models import hub, timm_names
from vit_jax.models.cost import flops, param_count
from vit_jax.models.registry import build, find, names, variants


class Row(NamedTuple):
    """A named model, with a head for 1000 classes (text towers have no head).

    params: the number of parameters.
    gflops: 1e9 operations of the forward pass of one input; a multiply-add counts as 2.
    input_size: the side of the image in pixels; for text, the number of tokens.
    """

    name: str
    params: int
    gflops: float
    input_size: int


def rows(only: Sequence[str] | None = None) -> Iterator[Row]:
    """Yields a row for every named model, or for those in `only`. Each model is traced.

    Models with required fields, such as plain `vit`, have no size and no row.
    """
    for name in names() if only is None else only:
        variant = variants()[find(name)]
        size = variant.input_size
        if size is not None:
            model = build(name, num_classes=variant.num_classes)
            yield Row(name, param_count(model, size), flops(model, size) / 1e9, size)


SEE_CARD = "see its card"

_TRAINED_AT = {"facebook/dinov2": 518}
"""The sides of images in pixels of models of the hub whose names tell none, and are not 224."""


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


def pretrained(pattern: str = "*") -> Iterator[Pretrained]:
    """Yields published weights whose names contain a pattern such as `dinov*`, by their names.

    Names of architectures that this package has not are left out. Each model is traced.

    Raises:
      UserError: no name contains the pattern.
    """
    found = 0
    for name, size, classes, stated in sorted(_published()):
        if not fnmatch.fnmatchcase(name, f"*{pattern}*"):
            continue
        try:
            params, gflops = _counted(name, size, classes)
        except UserError:
            continue
        found += 1
        yield Pretrained(name, params, gflops, size, stated, f"hf://{name}")
    if not found:
        raise UserError(f"no published name contains {pattern!r}; `models --pretrained` lists all")


def _published() -> Iterator[tuple[str, int, int, str]]:
    """Yields the name, the side of the images, the number of classes and the license."""
    for architecture, row in timm_names.table().items():
        for tag, (size, classes, stated) in row["tags"].items():
            yield f"timm/{architecture}.{tag}", size, classes, stated or SEE_CARD
    for name in hub.VARIANTS:
        told = re.search(r"-(\d{3})(?![\dm])", name)
        others = (size for start, size in _TRAINED_AT.items() if name.startswith(start))
        yield name, int(told[1]) if told else next(others, 224), 0, SEE_CARD


@functools.cache
def _counted(name: str, size: int, classes: int) -> tuple[int, float]:
    model = build(name, num_classes=classes)
    return param_count(model, size), flops(model, size) / 1e9
