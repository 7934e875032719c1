"""Whether values that users write are of the types that the code's annotations name."""

import collections.abc
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError

_KINDS: Mapping[Any, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "a text"),
}
_LISTS = (tuple, list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


def check_fields(owner: type, values: Mapping[str, Any], where: str) -> None:
    """Raises a `UserError` for the first of `values` that is not of its field's type.

    owner: a class with annotated fields, such as a dataclass; annotations that cannot be resolved
    check nothing. where: what the name of a field is to be read after, such as `config.task.`.
    """
    try:
        hints = typing.get_type_hints(owner)
    except (NameError, TypeError):
        return
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            raise UserError(f"{where}{name}={value!r}: write {_described(hints[name])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. Lists pass for tuples, integers for floats.

    What no value can be tested for, such as a protocol, passes.
    """
    origin, hints = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in hints)
    if origin in _LISTS:
        return isinstance(value, tuple | list) and _fit_all(value, origin, hints)
    if origin in _MAPPINGS:
        # A ConfigDict is no Mapping, but is as good as one.
        return hasattr(value, "keys") and all(fits(value[key], hints[1]) for key in value)
    if hint in _KINDS:
        # To Python, but not to people, True is a number.
        return isinstance(value, _KINDS[hint][0]) and (hint is bool or not isinstance(value, bool))
    try:
        return isinstance(value, hint)
    except TypeError:
        return True


def _fit_all(values: tuple | list, origin: Any, hints: tuple) -> bool:
    """Whether the entries of a list are of the types of `Sequence[...]` or `tuple[...]`."""
    if origin is not tuple or hints[-1] is Ellipsis:
        return all(fits(value, hints[0]) for value in values)
    return len(values) == len(hints) and all(map(fits, values, hints))


def _described(hint: Any) -> str:
    """What to write for a type, in words: "a whole number or a list of whole numbers"."""
    origin, hints = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_described, hints)))
    if origin in (tuple, *_LISTS):
        return f"a list of {_described(hints[0]).removeprefix('a ')}s"
    if origin in _MAPPINGS:
        return "{'name': value, ...}"
    if hint is type(None):
        return "None"
    return _KINDS[hint][1] if hint in _KINDS else f"a {getattr(hint, '__name__', hint)}"
