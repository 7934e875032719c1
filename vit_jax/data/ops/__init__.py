"""Preprocessing ops, found by name: every function of this package that carries a decorator.

An op never holds state. A random op gets a key of its own, int32 `[2]`, which is derived from the
stream position of the example, so the same position always gets the same augmentation.

To add an op, decorate a function in any file of this package. A function in a module of your own
works too; preprocessing strings then call it `package.module:function`:

    @image_op              def name(image, ...) -> image
    @random_image_op       def name(image, seed, ...) -> image
    @record_op             def name(record, ...) -> record
    @random_record_op      def name(record, seed, ...) -> record

A preprocessing string passes the arguments after those; they are checked against the annotations.

Compiled loops over several images at once replace TensorFlow operations that are slow. An image op
annotated `-> Batched` returns the kernel to call and the arguments of the call.
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
    """An image that is not computed yet: a NumPy kernel computes it together with others.

    Calling Python once per image would make the global lock a bottleneck on a host of 100 cores.
    """

    kernel: Callable[..., np.ndarray]
    """Takes the arguments with a batch axis, `[n, …]`; returns n images like its first argument."""
    arguments: "tuple[tf.Tensor, ...]"
    """The input image, then the other values that the kernel needs for it."""

    def apply(self) -> "tf.Tensor":
        """Returns the images, if `arguments` belong to several images (with a batch axis)."""
        from vit_jax.data.host_tensorflow import tf

        images = self.arguments[0]
        made = tf.numpy_function(self.kernel, self.arguments, images.dtype, stateful=False)
        return tf.ensure_shape(made, images.shape)

    def apply_alone(self) -> "tf.Tensor":
        """Returns the image, if `arguments` belong to one image (without a batch axis)."""
        return Batched(self.kernel, tuple(x[None] for x in self.arguments)).apply()[0]


def require_uint8(image: "tf.Tensor") -> None:
    """Raises a `ValueError` for images of another dtype; the caller adds the name of the op."""
    if image.dtype.name != "uint8":
        raise ValueError(f"needs uint8 images, not {image.dtype.name}: put it before value_range")


class Op(NamedTuple):
    """A decorated function and its name; `kind` determines the arguments of its calls."""

    name: str
    function: Callable[..., Any]
    kind: str

    @property
    def num_leading(self) -> int:
        """Returns the number of arguments from the pipeline, which precede those of the string."""
        return 2 if self.is_random else 1

    @property
    def is_random(self) -> bool:
        """Returns whether the op gets a key of its own."""
        return self.kind.startswith("random_")

    @property
    def is_batched(self) -> bool:
        """Returns whether the op returns a `Batched`."""
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
"""The finder of the ops that preprocessing strings name."""


def find_op(name: str) -> Op:
    """Returns the op called `name`. Raises `UserError` if there is none."""
    function = OPS.find(name)
    return Op(name, function, getattr(function, _MARK))
