"""Config files: read, and overridden from the command line.

A config file is Python: `get_config(arg)` starts from `default_config()`, sets keys and returns it.
`load` reads the file, applies `--config.key=value` overrides and validates; what comes out is
locked and complete, so that no later code needs a default of its own. The keys are in
`vit_jax.config.schema`.
"""

import ast
import difflib
import functools
import importlib.util
import os
import re
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import plugins, storage
from vit_jax.config.schema import ALIASES, SCHEMA, defaults, lock, walk
from vit_jax.config.section import Section, UnknownKey
from vit_jax.config.stored import flatten
from vit_jax.config.validation import plain, validate
from vit_jax.errors import UserError, nearest, quoted


def default_config() -> ConfigDict:
    """Returns a config with every key at its default, locked against unknown keys.

    Keys that were renamed have their earlier names, too, which stand for the same value.
    """
    config = Section.of(defaults(SCHEMA))
    for alias, path in ALIASES.items():
        *parents, last = path.split(".")
        section = functools.reduce(getattr, parents, config)
        section[alias.rsplit(".", maxsplit=1)[-1]] = section.get_ref(last)
    return lock(config)


def load(spec: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Returns the config that `NAME[:arguments]` and `--config.key=value` overrides describe.

    NAME is a config file, or the name of a recipe that ships with the package, as in `digits` or
    `configs/digits.py`. A file of that name goes first. Code that the config names is trusted from
    then on, for it is the user who named it. Overrides are texts, as the command line has them, or
    the values themselves.

    Raises:
      UserError: the file or its `get_config` is missing or fails, an argument or key is unknown, or
        a value has the wrong type.
    """
    spec = storage.path_text(spec, "config")
    path, _, arg = spec.partition(":") if not _is_file(spec) else (spec, "", "")
    config = _get_config(path, arg)
    apply_overrides(config, overrides or {})
    plugins.trust(config.to_dict())
    return validate(config)


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets keys, by dotted path, to values, or to what the texts of a command line stand for."""
    for dotted, value in parse_values(overrides).items():
        set_key(config, dotted, value)


def parse_values(texts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of texts of a command line: Python literals, else the texts themselves.

    What is no text is a value already.

    Raises:
      UserError: `texts` is no mapping.
    """
    if not isinstance(texts, Mapping):
        raise UserError(f"overrides={quoted(texts)}: write a mapping from keys to values")
    return {
        key: _parse_value(text) if isinstance(text, str) else plain(text)
        for key, text in texts.items()
    }


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # Too long for a path, or with characters that none can have.
        return False


def recipes() -> dict[str, Path]:
    """Returns the files of the recipes that ship with the package, by name.

    An installed package has them in its folder `configs`; in a checkout that folder is beside it.
    """
    package = Path(__file__).parents[1]
    folders = [package / "configs", package.parent / "configs"]
    folder = next((one for one in folders if one.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def _file_of(path: str) -> str:
    """Returns the config file that a user names. Raises `UserError` if there is none."""
    if _is_file(path):
        return path
    shipped = recipes()
    name = path.removeprefix("configs/").removesuffix(".py")
    if name in shipped and path in (name, f"configs/{name}.py"):
        return str(shipped[name])
    siblings = [str(p) for p in Path(path[:200].replace("\0", "")).parent.glob("*.py")]
    known = [*siblings, *shipped]
    raise UserError(f"config {quoted(path)}: no such file or recipe; {nearest(path, known)}")


def _get_config(path: str, arg: str) -> ConfigDict:
    """Returns what the `get_config` of a config file makes."""
    path = _file_of(path)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"config {path!r} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"config {path!r} defines no get_config(arg)")
        return module.get_config(arg)
    except SyntaxError as error:
        raise UserError(f"config {path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        unknown = [one for one in (error, *error.args) if isinstance(one, UnknownKey)]
        if unknown:
            raise UserError(f"config {path!r}: {unknown[0]}") from error
        if isinstance(error, UserError):
            raise
        raise UserError(f"config {path!r} fails ({plugins.reason_of(error)})") from error


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """Returns the arguments behind a config file's colon: `variant=S/16,runlocal` → a namespace.

    A value with commas is quoted: `root="my, photos"`. A shell removes these quotes, so that the
    whole value needs a second pair: `'configs/folder.py:"my, photos"'`.

    Values take the type of their default; a lone name sets a boolean; a lone value that is no
    name goes to the first key. (The convention of big_vision's config files.)

    Raises:
      UserError: an argument is unknown or of another type than its default.
    """
    values = dict(defaults)
    for position, (given, told) in enumerate(_arguments(arg or "")):
        name, text = given, told or ""
        if told is None:
            if isinstance(defaults.get(name), bool):
                text = "True"
            elif position == 0 and name not in defaults and defaults:
                name, text = next(iter(defaults)), given
        if name not in defaults:
            raise UserError(
                f"config argument {quoted(name)} is unknown; {nearest(name, defaults)}"
                + (_QUOTING if told is None and position else "")
            )
        default = defaults[name]
        value = text if isinstance(default, str) else _parse_value(text)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if default is not None and type(value) is not type(default):
            raise UserError(
                f"config argument {name}={quoted(text)} must be of type {type(default).__name__}"
            )
        values[name] = value
    return types.SimpleNamespace(**values)


_QUOTING = (
    """ (put a value with commas into double quotes, and the whole flag into single quotes, which"""
    """ the shell removes: '--config=CONFIG:"my, photos"')"""
)
_ARGUMENT = re.compile(
    r"""(?:(?P<name>[^=,"']*)=)?(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)')(?=,|$)"""
    r"""|(?P<plain>[^,]+)"""
)


def _arguments(arg: str) -> Iterator[tuple[str, str | None]]:
    """Yields the name and the text of each argument; the text is None for a value alone."""
    for match in _ARGUMENT.finditer(arg):
        if match["plain"] is not None:
            name, equals, text = match["plain"].partition("=")
            yield name, text if equals else None
            continue
        text = match["single"] if match["double"] is None else match["double"]
        yield (text, None) if match["name"] is None else (match["name"], text)


def set_key(config: ConfigDict, dotted: str, value: Any) -> None:
    """Sets `config.a.b.c`, under today's name of the key.

    Raises:
      UserError: the schema has no such key; a near one is suggested.
    """
    path = ALIASES.get(dotted, dotted)
    *parents, last = path.split(".")
    section = config
    for name in parents:
        child = section.get(name)
        if not isinstance(child, ConfigDict):
            if child is not None or section.is_locked:
                _unknown(config, dotted)
            child = _set(section, name, ConfigDict(type_safe=False), dotted)
        section = child
    if last not in section and section.is_locked:
        _unknown(config, dotted)
    if isinstance(section.get(last), ConfigDict):
        names = _names(section[last]) or "NAME"
        raise UserError(f"config.{dotted} is a section; write config.{dotted}.KEY, KEY of: {names}")
    _set(section, last, value, dotted)


def _set(section: ConfigDict, name: str, value: Any, dotted: str) -> Any:
    """Sets one key; returns its value. In an open section anything may be written."""
    refusal = UserError(
        f"config.{quoted(dotted)[1:-1]}={quoted(value)} cannot be set; write a number, a text, true"
        " or false, None, or lists and mappings of these (names without dots)"
    )
    if not _is_plain(value):
        raise refusal
    try:
        section[name] = value
        return section[name]
    # The library's own refusals, of names that it uses itself and numbers of hundreds of digits.
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise refusal from error


def _is_plain(value: Any) -> bool:
    """Returns whether `config.json` can hold a value."""
    if isinstance(value, dict | ConfigDict):
        names = all(isinstance(name, str) and "." not in name for name in value)
        return names and all(_is_plain(value[name]) for name in value)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _unknown(config: ConfigDict, dotted: str) -> None:
    known = [path for path, _ in flatten(config.to_dict())]
    written = f"config.{quoted(dotted)[1:-1]} is unknown"
    close = difflib.get_close_matches(dotted[:200], known, n=1, cutoff=0.7)
    by_leaf = [path for path in known if path.split(".")[-1] == dotted.rsplit(".", maxsplit=1)[-1]]
    if close or by_leaf:
        raise UserError(f"{written}; did you mean config.{(close or by_leaf)[0]}?")
    raise UserError(f"{written}; sections and keys: {_names(config)}")


def _names(section: ConfigDict) -> str:
    return ", ".join(sorted(map(str, section)))


def _parse_value(text: str) -> Any:
    """Returns a Python literal where the text is one, else the text.

    `true` and `false` are booleans. A text that Python cannot read for its size is no literal.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of backslashes in regular expressions.
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text


def describe() -> str:
    """Returns every key with its default, meaning, range and effect on resume (`train --keys`)."""
    lines = []
    for path, key in walk(SCHEMA):
        kept = ", ".join([key.on_resume, *(f"{n} {kind}" for n, kind in key.exceptions.items())])
        facts = "; ".join(filter(None, [key.range(), f"on resume: {kept}"]))
        lines.append(f"  {'.'.join(path)}={key.default!r}")
        lines.append(f"      {key.doc} ({facts})")
    return "\n".join(lines)
