"""Plug-ins by name, and the checks of what users write for them.

A plug-in is a model, task, optimizer rule, schedule, data source, preprocessing op, checkpoint
format, export format or log writer. Ours are public modules of one package each, so that a new one
is one new file; anyone else's is named `package.module:name`. Every kind is found by `Kind.find`,
and every name and key that users write is checked by `check_known`, so that all mistakes are
answered in the same words.
"""

import collections.abc
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import pkgutil
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vit_jax.errors import UserError, nearest, quoted


def check_known(
    name: Any, known: Iterable[str], where: str, what: str = "", *, otherwise: str = ""
) -> None:
    """Raises a `UserError` that suggests the nearest name unless `name` is one of `known`.

    Args:
      where: what the user wrote, such as `config.task.name='clasification'` or `--to=hg`.
      what: the kind of name, such as `task`; used as "is no {what}".
      otherwise: advice for a name that is near none of `known`, in place of the list of them.
    """
    known = list(known)
    if name not in known:
        verdict = f"is no {what}" if what else "is unknown"
        raise UserError(f"{where} {verdict}; {nearest(str(name), known, otherwise)}")


def names_in(package: str) -> list[str]:
    """Returns the names of the public modules of a package, which are those of its plug-ins.

    Packages inside it hold what plug-ins share.

    Nothing below the outermost package is imported, so that `--help` can list names at once.
    """
    if package in sys.modules:
        path = sys.modules[package].__path__
    else:
        root, *inner = package.split(".")
        spec = importlib.util.find_spec(root)
        roots = (spec and spec.submodule_search_locations) or ()
        path = [os.path.join(root, *inner) for root in roots]
    found = pkgutil.iter_modules(path)
    return sorted(one.name for one in found if one.name[0] != "_" and not one.ispkg)


def is_foreign(name: Any) -> bool:
    """Returns whether a name stands for code from outside this package."""
    return isinstance(name, str) and ":" in name.removeprefix(HUB_PREFIX)


HUB_PREFIX = "hf-hub:"
"""What open_clip and timm write before the name of a model on the Hugging Face hub."""

FOREIGN = re.compile(r"(?<![\w-])[^\W\d][\w.]*:[^\W\d][\w.]*")
"""The form `package.module:name` of the names of code from outside this package."""

_trusted: set[str] = set()


def trust(value: Any) -> None:
    """Notes that the user of this process has named all code that `value` names.

    Code that only a stored config names is imported after that alone, because importing it runs it.

    Args:
      value: a text, such as `my_models:Net`, or mappings and lists of texts, such as a config.
    """
    _trusted.update(_foreign_names(value))


def untrusted(value: Any) -> list[str]:
    """Returns the names of code from outside in a text, mapping or list that nobody trusts yet."""
    return [name for name in _foreign_names(value) if name not in _trusted]


def _foreign_names(value: Any) -> list[str]:
    if isinstance(value, str):
        return FOREIGN.findall(value)
    if hasattr(value, "values"):
        return _foreign_names(list(value.values()))
    if isinstance(value, list | tuple):
        return [name for entry in value for name in _foreign_names(entry)]
    return []


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of plug-in.

    Attributes:
      what: the kind in words, such as `optimizer`, for messages.
      package: the package whose public modules are our plug-ins of this kind; "" for none.
      attribute: the object of such a module that is the plug-in; "" for the one that has the
        module's own name.
      form: what users write for a plug-in of their own.
      accepts: whether an imported object can be a plug-in of this kind.
      requires: the attributes that an imported object must have.
      others: further names, of ours or of a library, and the plug-in of each.
      otherwise: advice for a name that is near none of ours; "" for a list of ours.
      advice: what to do about an imported object that is no plug-in; "" to write `form`.
    """

    what: str
    package: str = ""
    attribute: str = ""
    form: str = "package.module:function"
    accepts: Callable[[Any], bool] = callable
    requires: tuple[str, ...] = ()
    others: Callable[[], Mapping[str, Any]] = dict
    otherwise: str = ""
    advice: Callable[[Any], str] = lambda found: ""

    def names(self) -> list[str]:
        """Returns every name that `find` takes, but those of other packages."""
        return sorted({*self._modules(), *self.others()})

    def find(self, name: str, where: str = "") -> Any:
        """Returns the plug-in that `name` stands for.

        Args:
          name: one of `names()`, or `package.module:name`.
          where: the key or flag that the name was written for, such as `config.optim.name`.

        Raises:
          UserError: there is no such plug-in, or the object of that name is none.
        """
        written = f"{where}={quoted(name)}" if where else f"{self.what} {quoted(name)}"
        if not isinstance(name, str) or not name:
            raise UserError(
                f"{written}: write the name of {_article(self.what)} {self.what}, or {self.form}"
            )
        if is_foreign(name):
            if not FOREIGN.fullmatch(name):
                raise UserError(f"{written}: write {self.form}")
            return self._checked(_import(name, f"{written} cannot be imported", self.form), written)
        if name in self._modules():
            module = importlib.import_module(f"{self.package}.{name}")
            return getattr(module, self.attribute or name)
        others = self.others()
        what = self.what if where else ""
        check_known(name, {*self._modules(), *others}, written, what, otherwise=self.otherwise)
        return others[name]

    def _modules(self) -> list[str]:
        return names_in(self.package) if self.package else []

    def _checked(self, found: Any, written: str) -> Any:
        missing = [name for name in self.requires if not hasattr(found, name)]
        if not self.accepts(found) or missing:
            lacks = f" (it lacks {', '.join(missing)})" if missing else ""
            advice = self.advice(found) or f"write {self.form}"
            raise UserError(f"{written} is no {self.what}{lacks}; {advice}")
        return found


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _import(name: str, refusal: str, form: str) -> Any:
    """Returns the object `package.module:name`; modules of the current folder are found, too."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    # The module is code of the user's, which can fail in any way.
    except (Exception, SystemExit) as error:
        raise UserError(f"{refusal} ({reason_of(error)}); write {form}") from error
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        public = [name for name in dir(module) if not name.startswith("_")]
        hint = nearest(attribute, public, f"write {form}")
        raise UserError(f"{refusal}: module {module_name!r} has no such name; {hint}") from error


def reason_of(error: BaseException) -> str:
    """Returns an error of the user's code as one line, with the place where it arose."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {quoted(lines[0])[1:-1]}" if lines else repr(error)
    frames = traceback.extract_tb(error.__traceback__)
    if frames and "importlib" not in frames[-1].filename and frames[-1].filename != __file__:
        reason += f", {frames[-1].filename}:{frames[-1].lineno}"
    return reason


def takes(*arguments: str) -> Callable[[Any], bool]:
    """Returns a check for `Kind.accepts`: a function that can be called with these arguments."""

    def accepts(found: Any) -> bool:
        try:
            inspect.signature(found).bind(*arguments)
        except (TypeError, ValueError):
            return False
        return _is_function(found)

    return accepts


def returns(*classes: type) -> Callable[[Any], bool]:
    """Returns a check for `Kind.accepts`: a function that makes an object of one of `classes`.

    A function without an annotation passes, for it can only be known from its result.
    """

    def accepts(found: Any) -> bool:
        try:
            hint = typing.get_type_hints(found).get("return", Any)
        except (NameError, TypeError, AttributeError):
            hint = Any
        hints = typing.get_args(hint) or (hint,)
        fitting = any(isinstance(one, type) and issubclass(one, classes) for one in hints)
        return _is_function(found) and (hint is Any or fitting)

    return accepts


def _is_function(found: Any) -> bool:
    """Returns whether an object is written in Python, which what a plug-in may be always is."""
    return inspect.isfunction(inspect.unwrap(getattr(found, "func", found)))


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
            raise UserError(f"{where}{name}={quoted(value)}: write {described(hints[name])}")


_FLOATS = ("float16", "bfloat16", "float32", "float64")


def float_dtype(what: str, value: Any) -> Any:
    """Returns `value`, a dtype or its name, as one of the floating-point dtypes of JAX.

    what: the key or field that the value was written for, such as `config.optim.args.mu_dtype`.

    Raises:
      UserError: it is none. JAX would compute float64 in float32 unless its 64-bit mode is on, so
        float64 is refused without that mode.
    """
    import jax

    is_known = False
    dtype: Any = None
    with contextlib.suppress(Exception):  # NumPy parses names, and raises errors of several types.
        dtype = jax.numpy.dtype(value)
        is_known = dtype.name in _FLOATS and dtype.isnative
    is_kept = is_known and (dtype.name != "float64" or jax.config.values["jax_enable_x64"])
    if value is None or not is_kept:
        advice = "write float32 or bfloat16"
        raise UserError(f"{what}={quoted(value)} is not a floating-point type; {advice}")
    return dtype


def fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is of an annotated type. Lists pass for tuples, integers for floats.

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
        # To Python, but not to people, True is a number, and so are NaN and infinity.
        is_number = hint is bool or not isinstance(value, bool)
        is_small = hint not in _LARGEST or _is_small(value, _LARGEST[hint])
        return isinstance(value, _KINDS[hint][0]) and is_number and is_small
    try:
        return isinstance(value, hint)
    except TypeError:
        return True


_LARGEST = {int: 2**32 - 1, float: 2**31 - 1}
"""The largest integers that a whole number and a number may be; JAX takes those of 32 bits."""


def _is_small(value: Any, largest: int) -> bool:
    """Returns whether a value is a finite number, and if it is an integer, not beyond a limit."""
    if isinstance(value, int):
        return abs(value) <= largest
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _fit_all(values: tuple | list, origin: Any, hints: tuple) -> bool:
    """Returns whether the entries of a list are of the types of `Sequence[...]` or `tuple[...]`."""
    if origin is not tuple or hints[-1] is Ellipsis:
        return all(fits(value, hints[0]) for value in values)
    return len(values) == len(hints) and all(map(fits, values, hints))


def described(hint: Any) -> str:
    """Returns what to write for a type: "a whole number or a list of whole numbers"."""
    origin, hints = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(described, hints)))
    if origin is tuple and Ellipsis not in hints:
        return f"[{', '.join(map(described, hints))}]"
    if origin in _LISTS:
        return f"a list of {_plural(described(hints[0]))}"
    if origin in _MAPPINGS:
        return "{'name': value, ...}"
    if hint is type(None):
        return "None"
    return _KINDS[hint][1] if hint in _KINDS else f"a {getattr(hint, '__name__', hint)}"


def _plural(described: str) -> str:
    return f"{described.removeprefix('a ')}s" if described.startswith("a ") else described
