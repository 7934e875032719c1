"""Config files: read, overridden from the command line, checked against the schema, compared.

A config file is Python: `get_config(arg)` starts from `default_config()`, sets keys and returns it.
`load` reads the file, applies `--config.key=value` overrides and validates; what comes out is
locked and complete, so that no later code needs a default of its own. The keys are in
`vit_jax.config.schema`.
"""

import ast
import difflib
import functools
import importlib.util
import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config.durations import parse_duration
from vit_jax.config.schema import EVAL_SET_KEYS, FIXED, FREE, SCHEMA, WARNED, Key, defaults, walk
from vit_jax.errors import UserError, nearest
from vit_jax.plugins import check_known

VERSION = 1
"""Version of `config.json`; `MIGRATIONS[v]` turns a stored config of version v into v + 1."""

MIGRATIONS: dict[int, Callable[[dict], dict]] = {}


def default_config() -> ConfigDict:
    """A config with every key at its default, locked against unknown keys."""
    return _lock(ConfigDict(defaults(SCHEMA), type_safe=False))


def _lock(config: ConfigDict) -> ConfigDict:
    """Locks all sections but the open ones."""
    config.lock()
    for path, key in walk(SCHEMA):
        if key.kind == "open":
            functools.reduce(getattr, path, config).unlock()
    return config


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """The config that `FILE.py[:arguments]` and `--config.key=value` overrides describe.

    Raises:
      UserError: the file or its `get_config` is missing, an argument or key is unknown, or a value
        has the wrong type.
    """
    path, _, arg = spec.partition(":") if not Path(spec).exists() else (spec, "", "")
    config = _call_get_config(_import_file(path), path, arg)
    apply_overrides(config, overrides or {})
    return validate(config)


def apply_overrides(config: ConfigDict, overrides: Mapping[str, str]) -> None:
    """Sets keys, by dotted path, to the values that the texts of a command line stand for."""
    for dotted, value in parse_values(overrides).items():
        set_key(config, dotted, value)


def parse_values(texts: Mapping[str, str]) -> dict[str, Any]:
    """What texts of a command line stand for: Python literals, else the texts themselves."""
    return {key: _parse_value(text) for key, text in texts.items()}


def _import_file(path: str) -> types.ModuleType:
    if not Path(path).is_file():
        siblings = [str(p) for p in Path(path).parent.glob("*.py")]
        raise UserError(f"config {path!r}: no such file; {nearest(path, siblings)}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        raise UserError(f"config {path!r} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"config {path}:{error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config {path!r} defines no get_config(arg)")
    return module


def _call_get_config(module: types.ModuleType, path: str, arg: str) -> ConfigDict:
    try:
        return module.get_config(arg)
    except (AttributeError, KeyError) as error:
        # A locked ConfigDict names the key, and then prints itself over thirty lines.
        match = re.search(r'Key \\*"(\w+)\\*" does not exist', str(error))
        if match is None:
            raise
        names = {part for dotted, _ in flatten(defaults(SCHEMA)) for part in dotted.split(".")}
        raise UserError(
            f"config {path!r} sets the unknown key {match[1]!r}; {nearest(match[1], names)}"
        ) from error


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """The arguments behind a config file's colon: `variant=S/16,runlocal` → a namespace.

    Values take the type of their default; a lone name sets a boolean; a lone value that is no
    name goes to the first key. (The convention of big_vision's config files.)
    """
    values = dict(defaults)
    for position, item in enumerate(filter(None, (arg or "").split(","))):
        name, equals, text = item.partition("=")
        if not equals:
            if isinstance(defaults.get(name), bool):
                text = "True"
            elif position == 0 and name not in defaults and defaults:
                name, text = next(iter(defaults)), item
        check_known(name, defaults, f"config argument {name!r}")
        default = defaults[name]
        value = text if isinstance(default, str) else _parse_value(text)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if default is not None and type(value) is not type(default):
            raise UserError(
                f"config argument {name}={text!r} must be of type {type(default).__name__}"
            )
        values[name] = value
    return types.SimpleNamespace(**values)


def set_key(config: ConfigDict, dotted: str, value: Any) -> None:
    """Sets `config.a.b.c`; a key outside the schema is a `UserError` that suggests a near one."""
    *parents, last = dotted.split(".")
    section = config
    for name in parents:
        child = section.get(name)
        if not isinstance(child, ConfigDict):
            if child is None and not section.is_locked:
                child = section[name] = ConfigDict(type_safe=False)
            else:
                _unknown(config, dotted)
        section = child
    if last not in section and section.is_locked:
        _unknown(config, dotted)
    if isinstance(section.get(last), ConfigDict):
        names = _names(section[last]) or "NAME"
        raise UserError(f"config.{dotted} is a section; write config.{dotted}.KEY, KEY of: {names}")
    section[last] = value


def _unknown(config: ConfigDict, dotted: str) -> None:
    known = [path for path, _ in flatten(config.to_dict())]
    close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.7)
    by_leaf = [path for path in known if path.split(".")[-1] == dotted.rsplit(".", maxsplit=1)[-1]]
    if close or by_leaf:
        raise UserError(f"config.{dotted} is unknown; did you mean config.{(close or by_leaf)[0]}?")
    raise UserError(f"config.{dotted} is unknown; sections and keys: {_names(config)}")


def _names(section: ConfigDict) -> str:
    return ", ".join(sorted(section))


def _parse_value(text: str) -> Any:
    """A Python literal where the text is one, else the text; `true` and `false` are booleans."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def validate(config: ConfigDict) -> ConfigDict:
    """`config` as a complete, locked copy.

    Raises:
      UserError: an unknown or missing key, a wrong type, or values that cannot go together.
    """
    given = config.to_dict()
    _check_section(given, SCHEMA, "")
    _check_values(given)
    result = ConfigDict(given, type_safe=False)
    result.lock()
    return result


def _check_section(given: dict, schema: Mapping[str, Any], prefix: str) -> None:
    for name in given:
        check_known(name, schema, f"config.{prefix}{name}")
    for name, entry in schema.items():
        dotted = prefix + name
        if name not in given:
            raise UserError(f"config.{dotted} is missing; start from vit_jax.config.default_config")
        if isinstance(entry, dict):
            if not isinstance(given[name], dict):
                raise UserError(f"config.{dotted} must be a section with keys {sorted(entry)}")
            _check_section(given[name], entry, dotted + ".")
        else:
            given[name] = _checked(given[name], entry, dotted)


def _checked(value: Any, key: Key, dotted: str) -> Any:
    expected = type(key.default)
    if key.kind == "duration":
        parse_duration(value, dotted)
        return value
    if key.kind == "open":
        if not isinstance(value, dict):
            raise UserError(f"config.{dotted} must be a section, got {value!r}")
        return value
    if key.default is None:
        return value
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected in (list, tuple) and isinstance(value, list | tuple):
        return value
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UserError(
            f"config.{dotted} must be of type {expected.__name__}, got {value!r}"
            f" ({type(value).__name__})"
        )
    return value


def _check_values(given: dict) -> None:
    """Combinations that no single key's type can rule out."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    require(given["batch_size"] > 0, f"config.batch_size={given['batch_size']} must be positive")
    require(given["accum_steps"] > 0, f"config.accum_steps={given['accum_steps']} must be positive")
    require(
        given["batch_size"] % given["accum_steps"] == 0,
        f"config.batch_size={given['batch_size']} is not divisible by"
        f" config.accum_steps={given['accum_steps']}",
    )
    require(0 <= given["ema_decay"] < 1, f"config.ema_decay={given['ema_decay']}: write 0 to 1")
    require(
        given["precision"] in ("default", "high", "highest"),
        f"config.precision={given['precision']!r}: write default, high or highest",
    )
    require(
        given["data"]["on_bad_image"] in ("fail", "skip"),
        f"config.data.on_bad_image={given['data']['on_bad_image']!r}: write fail or skip",
    )
    require(given["data"]["timeout"] > 0, "config.data.timeout must be positive")
    require(given["checkpoint"]["retries"] >= 0, "config.checkpoint.retries must not be negative")
    require(given["checkpoint"]["keep_last"] >= 1, "config.checkpoint.keep_last must be at least 1")
    require(
        given["spikes"]["factor"] == 0 or given["spikes"]["factor"] > 1,
        f"config.spikes.factor={given['spikes']['factor']}: write more than 1, or 0 for no guard",
    )
    require(given["spikes"]["window"] >= 1, "config.spikes.window must be at least 1")
    for section in ("model", "task"):
        require("name" in given[section], f"config.{section}.name is missing")
    require(
        not (given["task"].get("randaug") and "randaug" in given["data"]["pp"]),
        "config.task.randaug and randaug in config.data.pp would augment twice; leave one out",
    )
    for axis in ("data", "fsdp", "tensor"):
        size = given["mesh"][axis]
        require(size == -1 or size >= 1, f"config.mesh.{axis}={size}: write -1 or a count")
    for name, entry in given["eval"]["sets"].items():
        require(
            isinstance(entry, dict),
            f"config.eval.sets.{name} must be a section with keys {', '.join(EVAL_SET_KEYS)}, got"
            f" {entry!r}",
        )
        for key in entry:
            check_known(key, EVAL_SET_KEYS, f"config.eval.sets.{name}.{key}")


def changes(old: Mapping, new: Mapping) -> dict[str, list[str]]:
    """What differs between a workdir's stored config and today's, by what it means on resume.

    Returns {"free": [...], "warned": [...], "fixed": [...]} of lines `key: old → new`.
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    found: dict[str, list[str]] = {FREE: [], WARNED: [], FIXED: []}
    for path in sorted(before.keys() | after.keys()):
        was, now = before.get(path), after.get(path)
        if was != now:
            found[_on_resume(path)].append(f"{path}: {was!r} → {now!r}")
    return found


def _on_resume(dotted: str) -> str:
    entry, names = SCHEMA, dotted.split(".")
    for position, name in enumerate(names):
        entry = entry.get(name, FIXED) if isinstance(entry, dict) else entry
        if isinstance(entry, Key):
            rest = names[position + 1 :]
            return entry.exceptions.get(rest[0], entry.on_resume) if rest else entry.on_resume
    return FIXED


def migrate(stored: dict, version: int) -> ConfigDict:
    """A stored config of an older version, brought to today's schema.

    Keys that were added since then take their defaults.

    Raises:
      UserError: the workdir was written by a newer version of this package.
    """
    if version > VERSION:
        raise UserError(
            f"the workdir's config has version {version}, this package reads up to {VERSION};"
            " update the package"
        )
    for step in range(version, VERSION):
        stored = MIGRATIONS[step](stored)
    values = defaults(SCHEMA)
    for path, value in flatten(stored, SCHEMA):
        *parents, last = path.split(".")
        section = values
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return _lock(ConfigDict(values, type_safe=False))


def flatten(
    section: Mapping, schema: Mapping | None = None, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Leaves of a nested mapping as (dotted path, value).

    With a schema, a section that it declares open is one leaf. Tuples read as lists, as in JSON.
    """
    for name, value in section.items():
        entry = schema.get(name) if schema is not None else None
        is_open = isinstance(entry, Key) and entry.kind == "open"
        if isinstance(value, Mapping) and not is_open:
            deeper = entry if isinstance(entry, dict) else None
            yield from flatten(value, deeper, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _jsonlike(value)


def _jsonlike(value: Any) -> Any:
    return [_jsonlike(v) for v in value] if isinstance(value, list | tuple) else value


def describe() -> str:
    """Every key with its default, its meaning and what a change does on resume: `train --keys`."""
    lines = []
    for path, key in walk(SCHEMA):
        kept = "; ".join([key.on_resume, *(f"{n}: {kind}" for n, kind in key.exceptions.items())])
        lines.append(f"  {'.'.join(path)}={key.default!r}")
        lines.append(f"      {key.doc} [on resume: {kept}]")
    return "\n".join(lines)
