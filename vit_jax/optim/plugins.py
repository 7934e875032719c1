"""Functions that a config names: ours by a plain name, anyone's as `package.module:function`."""

import importlib
from collections.abc import Callable, Mapping

from vit_jax.errors import UserError, nearest


def load_function(name: str, ours: Mapping[str, Callable], *, where: str, kind: str) -> Callable:
    """The function called `name`; `where` is the config key, `kind` what the function is."""
    if ":" not in name:
        if name not in ours:
            raise UserError(f"{where}: unknown {kind} {name!r}; {nearest(name, ours)}")
        return ours[name]
    return import_function(name, where=where, kind=kind)


def import_function(name: str, *, where: str, kind: str) -> Callable:
    """The function that `package.module:name` stands for."""
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{where}: cannot load the {kind} {name!r} ({error}); write package.module:function"
        ) from error
    if not callable(function):
        raise UserError(f"{where}: {name!r} is not a function")
    return function
