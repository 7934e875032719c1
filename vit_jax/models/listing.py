"""The table that `python -m vit_jax models` prints."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
