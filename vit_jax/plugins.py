"""Plug-ins by name, and the checks of what users write for them.

A plug-in is a model, task, optimizer rule, schedule, data source, preprocessing op, checkpoint
format, export format or log writer. Ours are public modules of one package each, so that a new one
is one new file; anyone else's is named `package.module:name`. Every kind is found by `Kind.find`,
and every name and key that users write is checked by `check_known`, so that all mistakes are
answered in the same words.
"""

import collections.abc
import dataclasses
import functools
import importlib
import numbers
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vit_jax.errors import UserError, nearest


def check_known(name: str, known: Iterable[str], where: str, what: str = "") -> None:
    """Raises a `UserError` that suggests the nearest name unless `name` is one of `known`.

    Args:
      where: what the user wrote, such as `config.task.name='clasification'` or `--to=hg`.
      what: the kind of name, such as `task`; used as "is no {what}".
    """
    known = list(known)
    if name not in known:
        verdict = f"is no {what}" if what else "is unknown"
        raise UserError(f"{where} {verdict}; {nearest(name, known)}")


def names_in(package: str) -> list[str]:
    """Returns the names of the public modules of a package, which are those of its plug-ins."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if module.name[0] != "_")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of plug-in.

    Attributes:
      what: the kind in words, such as `optimizer`, for messages.
      package: the package whose public modules are our plug-ins of this kind.
      attribute: the object of such a module that is the plug-in; "" for the one that has the
        module's own name.
      form: what users write for a plug-in of their own.
      accepts: whether an imported object can be a plug-in of this kind.
      others: further names, of ours or of a library, and the plug-in of each.
    """

    what: str
    package: str
    attribute: str = ""
    form: str = "package.module:function"
    accepts: Callable[[Any], bool] = callable
    others: Callable[[], Mapping[str, Any]] = dict

    def names(self) -> list[str]:
        """Returns every name that `find` takes, but those of other packages."""
        return sorted({*names_in(self.package), *self.others()})

    def find(self, name: str, where: str) -> Any:
        """Returns the plug-in that `name` stands for.

        Args:
          name: one of `names()`, or `package.module:name`.
          where: the key or flag that the name was written for, such as `config.optim.name`.

        Raises:
          UserError: there is no such plug-in, or what was imported is none.
        """
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}={name!r}: write the name of a {self.what}, or {self.form}")
        if ":" in name:
            return self._import(name, where)
        if name in names_in(self.package):
            module = importlib.import_module(f"{self.package}.{name}")
            return getattr(module, self.attribute or name)
        check_known(name, self.names(), f"{where}={name!r}", f"{self.what} of ours")
        return self.others()[name]

    def _import(self, name: str, where: str) -> Any:
        module_name, _, attribute = name.partition(":")
        try:
            module = importlib.import_module(module_name)
            found = functools.reduce(getattr, attribute.split("."), module)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"{where}={name!r} cannot be imported ({reason}); write {self.form}"
            ) from error
        if not self.accepts(found):
            raise UserError(f"{where}={name!r} is no {self.what}; write {self.form}")
        return found


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
