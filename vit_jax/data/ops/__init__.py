"""Preprocessing ops, found by name: every function below that carries one of the decorators.

An op never holds state. Random ones get a key of their own, int32 `[2]`, derived from the stream
position of the example, so that the same position always meets the same augmentation.

To add one, decorate a function in any file of this package:

    @image_op              def name(image, ...) -> image
    @random_image_op       def name(image, seed, ...) -> image
    @record_op             def name(record, ...) -> record
    @random_record_op      def name(record, seed, ...) -> record

Arguments after those are what a preprocessing string may pass; their annotations are checked.

What TensorFlow's own operations are slow at is done by compiled loops over several images at once:
an op of images that says `-> Batched` returns what is to be done, and to what.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError, nearest

if TYPE_CHECKING:
    import tensorflow as tf


class Batched(NamedTuple):
    """An image that a function of several images, in NumPy, has yet to make.

    Calling Python for one image at a time would keep its lock busy on a host of a hundred cores.
    """

    kernel: Callable[..., np.ndarray]
    """Of arrays like the arguments, `[n, …]`: n images of the first one's shape and dtype."""
    arguments: "tuple[tf.Tensor, ...]"
    """The image before, and what else the kernel needs of it."""

    def apply(self) -> "tf.Tensor":
        """The images, where the arguments are those of several."""
        from vit_jax.data.host_tensorflow import tf

        images = self.arguments[0]
        made = tf.numpy_function(self.kernel, self.arguments, images.dtype, stateful=False)
        return tf.ensure_shape(made, images.shape)

    def apply_alone(self) -> "tf.Tensor":
        """The image, where the arguments are those of one."""
        return Batched(self.kernel, tuple(x[None] for x in self.arguments)).apply()[0]


def require_uint8(image: "tf.Tensor") -> None:
    """Raises a `ValueError`, which becomes an error that names the op, for other images."""
    if image.dtype.name != "uint8":
        raise ValueError(f"needs uint8 images, not {image.dtype.name}: put it before value_range")


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

    @property
    def is_batched(self) -> bool:
        """Whether it returns a `Batched`."""
        return inspect.signature(self.function).return_annotation is Batched


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
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
    if name not in _OPS:
        raise UserError(f"unknown preprocessing op {name!r}; {nearest(name, _OPS)}")
    return _OPS[name]
