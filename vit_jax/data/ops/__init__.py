"""Preprocessing ops, found by name: every function below that carries one of the decorators.

An op never holds state. Random ones get a key of their own, int32 `[2]`, derived from the stream
position of the example, so that the same position always meets the same augmentation.

To add one, decorate a function in any file of this package:

    @image_op              def name(image, ...) -> image
    @random_image_op       def name(image, seed, ...) -> image
    @record_op             def name(record, ...) -> record
    @random_record_op      def name(record, seed, ...) -> record

Arguments after those are what a preprocessing string may pass; their annotations are checked.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from vit_jax.errors import UserError, nearest


class Op(NamedTuple):
    """A registered op; `kind` says what it is called with."""

    name: str
    function: Callable[..., Any]
    kind: str

    @property
    def num_leading(self) -> int:
        """How many arguments come from the pipeline, before those of the string."""
        return 2 if self.is_random else 1

    @property
    def is_random(self) -> bool:
        """Whether it gets a key of its own."""
        return self.kind.startswith("random_")


_OPS: dict[str, Op] = {}


def _register(kind: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        _OPS[function.__name__] = Op(function.__name__, function, kind)
        return function

    return register


image_op = _register("image")
random_image_op = _register("random_image")
record_op = _register("record")
random_record_op = _register("random_record")


def find_op(name: str) -> Op:
    """The op called `name`."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    if name not in _OPS:
        raise UserError(f"unknown preprocessing op {name!r}; {nearest(name, _OPS)}")
    return _OPS[name]
