"""Preprocessing ops, found by name: every function of this package that carries a decorator.

An op never holds state. Random ones get a key of their own, int32 `[2]`, derived from the stream
position of the example, so that the same position always meets the same augmentation.

To add one, decorate a function in any file of this package, or in any module of your own, where
preprocessing strings name it `package.module:function`:

    @image_op              def name(image, ...) -> image
    @random_image_op       def name(image, seed, ...) -> image
    @record_op             def name(record, ...) -> record
    @random_record_op      def name(record, seed, ...) -> record

Arguments after those are what a preprocessing string may pass; their annotations are checked.

What TensorFlow's own operations are slow at is done by compiled loops over several images at once:
an op of images that says `-> Batched` returns what is to be done, and to what.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError
from vit_jax.plugins import Kind, names_in

if TYPE_CHECKING:
    import tensorflow as tf


class MissingField(UserError):
    """A record lacks a field that an op reads."""


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
    """A decorated function under its name; `kind` says what it is called with."""

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


_MARK = "op_kind"


def _marker(kind: str) -> Callable[[Callable], Callable]:
    def mark(function: Callable) -> Callable:
        setattr(function, _MARK, kind)
        return function

    return mark


image_op = _marker("image")
random_image_op = _marker("random_image")
record_op = _marker("record")
random_record_op = _marker("random_record")


@functools.cache
def _of_ours() -> Mapping[str, Callable]:
    """Returns the ops of this package by name."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names_in(__name__)]
    return {
        name: function
        for module in modules
        for name, function in vars(module).items()
        if hasattr(function, _MARK)
    }


OPS = Kind(
    "preprocessing op",
    accepts=inspect.isfunction,
    requires=(_MARK,),
    others=_of_ours,
)
"""Where the ops of preprocessing strings are looked for."""


def find_op(name: str) -> Op:
    """Returns the op called `name`. Raises `UserError` where there is none."""
    function = OPS.find(name)
    return Op(name, function, getattr(function, _MARK))
