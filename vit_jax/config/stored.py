"""Configs that runs stored: brought to today's schema, compared on resume, and not trusted."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax import plugins
from vit_jax.config.schema import ALIASES, FIXED, FREE, SCHEMA, WARNED, Key, defaults, find, lock
from vit_jax.errors import UserError, quoted

VERSION = 1
"""Version of `config.json`; `MIGRATIONS[v]` turns a stored config of version v into v + 1."""

MIGRATIONS: dict[int, Callable[[dict], dict]] = {}


def migrate(stored: Any, version: int) -> ConfigDict:
    """Returns a stored config of an older version in today's schema.

    Keys that were added since then take their defaults; renamed ones keep their values.

    Raises:
      UserError: the workdir was written by a newer version of this package.
    """
    if not isinstance(version, int) or version > VERSION:
        raise UserError(
            f"the config of the workdir has version {quoted(version)}, this package reads up to"
            f" {VERSION}; update the package"
        )
    for step in range(version, VERSION):
        stored = MIGRATIONS[step](stored)
    if not isinstance(stored, Mapping):
        raise UserError(f"a stored config is a section with keys, not {quoted(stored)}")
    return lock(ConfigDict(_completed(stored, SCHEMA), type_safe=False))


def _completed(stored: Any, schema: Mapping[str, Any], prefix: str = "") -> Any:
    """Returns a section with defaults for the keys that it lacks."""
    if not isinstance(stored, Mapping):
        return stored  # The validation that follows names it.
    section = defaults(schema)
    for name, value in stored.items():
        path = ALIASES.get(prefix + name, prefix + name)
        entry = schema.get(name)
        section[path.removeprefix(prefix)] = (
            _completed(value, entry, f"{path}.") if isinstance(entry, dict) else value
        )
    return section


def check_trust(config: Mapping[str, Any], where: str) -> None:
    """Raises a `UserError` for code from outside this package that the user did not name.

    Whoever wrote a stored config chose that code, and importing it runs it. `vit_jax.plugins.trust`
    notes what the user of this process has named.

    where: the file that the config was read from.
    """
    found = dict(_untrusted(config))
    if found:
        names = ",".join(dict.fromkeys(found.values()))
        keys = ", ".join(f"config.{path}={name}" for path, name in found.items())
        raise UserError(
            f"{where} names code from outside this package, which would run: {keys}; if you trust"
            f" it, write --trust={names}"
        )


def _untrusted(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the path and the name of each piece of code that is not trusted."""
    for path, value in flatten(config):
        key = find(_key_of_entry(path))
        if key is None or key.kind not in ("place", "pattern"):
            yield from ((path, name) for name in plugins.untrusted(value))


def _key_of_entry(path: str) -> str:
    """Returns `data.pp` for `eval.sets.val.pp` and `stages.low.data.pp`, else the path itself."""
    match path.split("."):
        case ["stages", _, *key]:
            return ".".join(key)
        case ["eval", "sets", _, key] | ["eval", "probes", key]:
            return f"data.{key}"
    return path


def changes(old: Mapping, new: Mapping) -> dict[str, list[str]]:
    """Returns the differences between a stored config and today's, by their effect on resume.

    The result is {"free": [...], "warned": [...], "fixed": [...]}, of lines `key: old → new`.
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    found: dict[str, list[str]] = {FREE: [], WARNED: [], FIXED: []}
    for path in sorted(before.keys() | after.keys()):
        was, now = before.get(path), after.get(path)
        if was != now:
            found[on_resume(path)].append(f"{path}: {was!r} → {now!r}")
    return found


def on_resume(dotted: str) -> str:
    """Returns the effect of a changed key on resume; unknown keys are fixed."""
    entry, names = SCHEMA, dotted.split(".")
    for position, name in enumerate(names):
        entry = entry.get(name, FIXED) if isinstance(entry, dict) else entry
        if isinstance(entry, Key):
            rest = names[position + 1 :]
            return entry.exceptions.get(rest[0], entry.on_resume) if rest else entry.on_resume
    return FIXED


def flatten(section: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a nested mapping as (dotted path, value).

    Tuples read as lists, as in JSON.
    """
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _jsonlike(value)


def _jsonlike(value: Any) -> Any:
    return [_jsonlike(v) for v in value] if isinstance(value, list | tuple) else value
