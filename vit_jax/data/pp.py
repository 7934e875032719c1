"""Preprocessing strings in big_vision's syntax: `"decode|resize(256)|central_crop(224)"`.

Ops are joined by `|` and take literal arguments. An image op processes the field `image`, unless
`key=`, or `inkey=` and `outkey=`, name other fields. An op of your own is named
`package.module:function`. Strings are parsed, never evaluated.
"""

import ast
import functools
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from vit_jax.data.ops import Batched, MissingField, Op, find_op
from vit_jax.errors import UserError, first_line, nearest, quoted
from vit_jax.plugins import check_known, fits

Record = dict[str, Any]

VALUE_OPS = ("value_range", "vgg_value_range", "clip_value_range")
"""The ops of `ops.values`, which set the range of images, listed here to avoid TensorFlow."""

_SCALED = "joint_scale and joint_crop"
_JOINT = {
    "flip_lr": "joint_flip_lr",
    "random_crop": "joint_crop",
    "inception_crop": _SCALED,
    "decode_jpeg_and_inception_crop": f"joint_decode, {_SCALED}",
    "random_affine": _SCALED,
    "randaug": "photometric_distortion",
    "randaug_increasing": "photometric_distortion",
}
"""For ops that draw how they move the pixels of an image: what to write if labels must follow."""


class Step(NamedTuple):
    """One op of a preprocessing string with its arguments."""

    text: str
    op: Op
    arguments: inspect.BoundArguments
    inkey: str
    outkey: str


class Call(NamedTuple):
    """One op of a preprocessing string as written: its name is not looked up."""

    text: str
    name: str
    args: list
    kwargs: dict[str, Any]


def parse(pp: str) -> list[Step]:
    """Returns the steps of a preprocessing string.

    Raises:
        UserError: the string cannot be parsed, names an op or an argument that does not exist, or
            has an argument of the wrong type.
    """
    return [_step(call) for call in calls(pp)]


def calls(pp: str) -> list[Call]:
    """Returns the ops of a preprocessing string without looking them up. Raises `UserError`."""
    if not pp.strip():
        return []
    # A bar inside a quoted argument does not join ops.
    masked = _QUOTED.sub(lambda match: "_" * len(match[0]), pp)
    bars = [place for place, letter in enumerate(masked) if letter == "|"]
    bounds = itertools.pairwise([-1, *bars, len(pp)])
    return [_call(pp[start + 1 : end].strip(), pp) for start, end in bounds]


_QUOTED = re.compile(r"""\"(?:\\.|[^"\\])*\"|'(?:\\.|[^'\\])*'""")
_NAME = re.compile(r"[^\W\d]\w*|[\w.]+:[\w.]+")


def _call(text: str, pp: str) -> Call:
    """Reads one op, such as `resize(224)`, of the preprocessing string `pp`."""
    name, bracket, rest = text.partition("(")
    name = name.strip()
    if not _NAME.fullmatch(name):
        raise UserError(
            f"preprocessing {quoted(pp)} is not understood: join ops by '|', as in"
            " 'decode|resize(224)'"
        )
    try:
        # Only the arguments are Python: the name of an op from another package has a colon.
        node = ast.parse(f"_({rest}" if bracket else "_()", mode="eval").body
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            raise ValueError("it is no call")
        args = [ast.literal_eval(argument) for argument in node.args]
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(
            f"preprocessing op {quoted(text)} is not understood: write name(arguments), the"
            " arguments plain values"
        ) from error
    return Call(text, name, args, kwargs)


def vocabularies(pp: str) -> dict[str, str]:
    """Returns the vocabulary of each field that a preprocessing string fills with token numbers."""
    made = (step.arguments.arguments for step in parse(pp) if step.op.name == "tokenize")
    return {arguments["key_result"]: arguments["vocab"] for arguments in made}


def check_moves(pp: str, labels: Collection[str], where: str) -> None:
    """Checks that no op moves the pixels of `image` away from the labels of their places.

    Args:
      labels: the fields with such labels that are read, such as "boxes" or "segmentation".
      where: the key of the config that has the preprocessing string, for the message.

    Raises:
      UserError: an op does; the message names the op for image and labels.
    """
    # A center that is cut out of an image can be cut out of its segmentation by the same op.
    joint = _JOINT | ({"central_crop": "joint_fit"} if "boxes" in labels else {})
    for call in calls(pp) if labels else ():
        place = call.kwargs.get("outkey", call.kwargs.get("key", "image"))
        if call.name in joint and place == "image":
            raise UserError(
                f"{where}: {call.text!r} moves the pixels of the image but not its"
                f" {' and '.join(labels)}; write {joint[call.name]} instead"
            )


def build(pp: str) -> Callable[[Record, Any], Record]:
    """Returns the function `(record, seed) -> record` that a preprocessing string describes.

    `seed` is int32 `[2]`; each random op of the string gets a key split from it.
    """

    def preprocess(record: Record, seed: Any) -> Record:
        for stage in stages(pp):
            record = {
                key: x.apply_alone() if isinstance(x, Batched) else x
                for key, x in stage(record, seed).items()
            }
        return record

    return preprocess


def stages(pp: str) -> list[Callable[[Record, Any], Record]]:
    """Returns the function of `build` as a list of stages.

    A stage may leave a `Batched` in its record, which the caller must replace by its image before
    the next stage.
    """
    from vit_jax.data.host_tensorflow import tf

    steps = parse(pp)
    num_random = sum(step.op.is_random for step in steps)

    def stage(start: int, stop: int, record: Record, seed: tf.Tensor) -> Record:
        keys = tf.unstack(tf.random.split(seed, num_random)) if num_random else []
        keys = iter(keys[sum(step.op.is_random for step in steps[:start]) :])
        for step in steps[start:stop]:
            record = apply_step(step, record, keys)
        return record

    ends = [number for number, step in enumerate(steps, 1) if step.op.is_batched]
    bounds = [0, *ends]
    if not ends or ends[-1] < len(steps):
        bounds.append(len(steps))
    return [functools.partial(stage, *bound) for bound in itertools.pairwise(bounds)]


def apply_step(step: Step, record: Record, seeds: typing.Iterator) -> Record:
    """Applies one op to a record and returns the new record; `seeds` yields keys for random ops.

    Raises:
        MissingField: the op reads a field that the record does not have.
        UserError: the op does not fit the record for another reason.
    """
    from vit_jax.data.host_tensorflow import tf

    try:
        return _apply(step, record, seeds)
    except UserError as error:
        raise type(error)(f"preprocessing op {step.text!r}: {error}") from error
    except KeyError as error:
        field = error.args[0]
        raise MissingField(
            f"preprocessing op {step.text!r} needs the field {field!r}, which records do"
            f" not have here; {nearest(str(field), record)}"
        ) from error
    except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
        reason = first_line(error)
        raise UserError(f"preprocessing op {step.text!r} does not fit: {reason}") from error


def _apply(step: Step, record: Record, seeds: typing.Iterator) -> Record:
    args, kwargs = step.arguments.args, step.arguments.kwargs
    if step.op.kind == "record":
        return step.op.function(record, *args, **kwargs)
    if step.op.kind == "random_record":
        return step.op.function(record, next(seeds), *args, **kwargs)
    if step.inkey not in record:
        raise MissingField(f"records have no field {step.inkey!r}; {nearest(step.inkey, record)}")
    image = record[step.inkey]
    if image.dtype.name == "string" and not step.op.name.startswith("decode"):
        raise UserError("the image is still encoded; put 'decode' before this op")
    if step.op.kind == "random_image":
        image = step.op.function(image, next(seeds), *args, **kwargs)
    else:
        image = step.op.function(image, *args, **kwargs)
    return record | {step.outkey: image}


def _step(call: Call) -> Step:
    op = find_op(call.name)
    kwargs = dict(call.kwargs)
    inkey = outkey = "image"
    if not op.kind.endswith("record"):
        key = kwargs.pop("key", "image")
        inkey, outkey = kwargs.pop("inkey", key), kwargs.pop("outkey", key)
    return Step(call.text, op, _bind(op, call.text, call.args, kwargs), inkey, outkey)


def _bind(op: Op, text: str, args: list, kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """Binds the arguments to the op's parameters and checks names and types."""
    signature = inspect.signature(op.function)
    parameters = list(signature.parameters.values())[op.num_leading :]
    names = [parameter.name for parameter in parameters]
    for name in kwargs:
        check_known(name, names, f"preprocessing op {text!r}: {name}", "argument of it")
    try:
        bound = signature.replace(parameters=parameters).bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f"preprocessing op {text!r}: {error}") from error
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        values = value if parameter.kind is parameter.VAR_POSITIONAL else (value,)
        for one in values:
            if not fits(one, parameter.annotation):
                wanted = getattr(parameter.annotation, "__name__", str(parameter.annotation))
                raise UserError(f"preprocessing op {text!r}: {name} must be {wanted}, not {one!r}")
    bound.apply_defaults()
    return bound
