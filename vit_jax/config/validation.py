"""Checks of a whole config: known keys, values of the right type and range, and combinations."""

import contextlib
import math
import re
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vit_jax.config import stages
from vit_jax.config.durations import parse_duration
from vit_jax.config.schema import EVAL_SET_KEYS, PROBES, SCHEMA, Key, defaults
from vit_jax.config.section import Section
from vit_jax.errors import UserError, quoted
from vit_jax.plugins import check_known, described, fits

_LARGEST = 2**31 - 1
"""The largest whole number that a key may have: devices count in int32."""


def validate(config: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    """Returns a config, or nested dictionaries with all keys of one, as a complete, locked copy.

    Raises:
      UserError: an unknown or missing key, a wrong type, or values that cannot go together.
    """
    given = _check_whole(as_dict(config))
    for name, stage in given["stages"].items():
        settings = stages.settings(given, name)
        try:
            _check_whole(settings)
        except UserError as error:
            raise UserError(f"config.stages.{name}: {error}") from error
        stages.check_keys(name, stage, given)
    result = Section.of(given)
    result.lock()
    return result


def _check_whole(given: Any) -> dict[str, Any]:
    checked = check_section(given, SCHEMA, "")
    _check_combinations(checked)
    return checked


def as_dict(config: Any) -> Any:
    """Returns a config as nested dictionaries; anything else as it is."""
    return config.to_dict() if isinstance(config, ConfigDict) else config


def check_section(given: Any, schema: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns a section with each value in the type of its key, and its keys under today's names.

    Raises:
      UserError: the section is none, or a key is unknown, missing, or of a wrong value.
    """
    if not hasattr(given, "items"):
        names = ", ".join(schema)
        raise UserError(
            f"{f'config.{prefix}'[:-1]}={quoted(given)}: write a section with the keys {names}"
        )
    given = _with_todays_names(given, schema)
    for name in given:
        check_known(name, schema, f"config.{prefix}{name}")
    checked = {}
    for name, entry in schema.items():
        dotted = prefix + name
        if name not in given:
            raise UserError(f"config.{dotted} is missing; start from vit_jax.config.default_config")
        check = check_value if isinstance(entry, Key) else check_section
        checked[name] = check(given[name], entry, dotted + "." * (check is check_section))
    return checked


def _with_todays_names(given: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(given)
    for name, entry in schema.items():
        for alias in getattr(entry, "aliases", ()):
            if alias in result:
                value = result.pop(alias)
                result.setdefault(name, value)
    return result


def check_value(value: Any, key: Key, dotted: str) -> Any:
    """Returns the value of one key in the key's type.

    Raises:
      UserError: the value is of another type, or out of range.
    """
    value = plain(value)
    if key.kind == "duration":
        _check_durations(value, key, dotted)
        return value
    hint: Any = type(key.default) if key.of is None else types.GenericAlias(list, (key.of,))
    if isinstance(key.default, float) and fits(value, float):
        with contextlib.suppress(OverflowError):
            value = float(value)
    numbers = value if isinstance(value, list | tuple) else [value]
    if not fits(value, hint) or not all(_in_range(number, key) for number in numbers):
        section = key.kind == "open"
        wanted = "a section, {key: value, ...}" if section else described(hint)
        bounds = f", {key.range()}" if key.range() else ""
        raise UserError(f"config.{dotted}={quoted(value)}: write {wanted}{bounds}")
    if key.choices:
        check_known(value, key.choices, f"config.{dotted}={quoted(value)}")
    if key.kind == "pattern":
        for entry in numbers:
            check_pattern(entry if isinstance(entry, str) else entry[0], f"config.{dotted}")
    return value


def plain(value: Any) -> Any:
    """Returns a value with Python's numbers in place of NumPy's, as JSON can store them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def _in_range(value: Any, key: Key) -> bool:
    """Returns whether a value, if it is a number, is a finite one in the range of its key."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    if isinstance(value, int) and key.at_most is None and value > _LARGEST:
        return False
    return math.isfinite(value) and key.contains(value)


def _check_durations(value: Any, key: Key, dotted: str) -> None:
    if isinstance(key.default, list):
        if not isinstance(value, list | tuple):
            raise UserError(f"config.{dotted}={quoted(value)}: write a list of durations")
        for entry in value:
            parse_duration(entry, dotted)
    elif not key.contains(parse_duration(value, dotted)[0]):
        raise UserError(f"config.{dotted}={quoted(value)}: write a duration, {key.range()}")


def check_pattern(pattern: Any, where: str) -> re.Pattern[str]:
    """Returns a compiled regular expression. Raises `UserError` if it is none.

    where: the key it is the value of, such as `config.optim.freeze`.
    """
    try:
        return re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{where}: {quoted(pattern)} is not a regular expression ({error})"
        ) from error


def _check_combinations(given: dict) -> None:
    """Checks what no single key can rule out."""
    if given["batch_size"] % given["accum_steps"]:
        raise UserError(
            f"config.batch_size={given['batch_size']} is not divisible by"
            f" config.accum_steps={given['accum_steps']}"
        )
    for section in ("model", "task"):
        if "name" not in given[section]:
            raise UserError(f"config.{section}.name is missing")
    if given["task"].get("randaug") and "randaug" in given["data"]["pp"]:
        raise UserError(
            "config.task.randaug and randaug in config.data.pp would augment twice; leave one out"
        )
    sets = given["eval"]["sets"]
    for name, entry in sets.items():
        _check_eval_set(entry, f"eval.sets.{name}")
        if given["ema_decay"] and f"{name}_ema" in sets:
            raise UserError(
                f"config.eval.sets.{name}_ema: the metrics of the averaged parameters on"
                f" {quoted(name)} have that name; write another one"
            )

    complete_probes(given["eval"]["probes"])
    complete_schedules(given["optim"])
    complete_decay_schedule(given["optim"])


def _check_eval_set(entry: Any, dotted: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(
            f"config.{dotted}={quoted(entry)}: write a section with the keys"
            f" {', '.join(EVAL_SET_KEYS)}"
        )
    for key, value in entry.items():
        check_known(key, EVAL_SET_KEYS, f"config.{dotted}.{key}")
        check_value(value, SCHEMA["data"][key], f"{dotted}.{key}")


def complete_probes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `eval.probes` complete, or {} without one. Raises `UserError`."""
    if not given:
        return {}
    own = {key: value for key, value in given.items() if key not in PROBES}
    for key in own:
        check_known(key, (*EVAL_SET_KEYS, *PROBES), f"config.eval.probes.{key}")
    if not given.get("split"):
        raise UserError(
            "config.eval.probes.split is missing: write which labeled images the classifiers know,"
            " such as train[:10%]"
        )
    _check_eval_set(own, "eval.probes")
    settings = {**defaults(PROBES), **{key: given[key] for key in PROBES if key in given}}
    return {**own, **check_section(settings, PROBES, "eval.probes.")}


def complete_schedules(optim: Mapping[str, Any]) -> list[list[Any]]:
    """Returns `optim.group_schedules` with each schedule complete. Raises `UserError`."""
    schema = SCHEMA["optim"]["schedule"]
    return [
        [
            check_pattern(pattern, "config.optim.group_schedules").pattern,
            check_section({**defaults(schema), **schedule}, schema, f"optim.group_schedules[{i}]."),
        ]
        for i, (pattern, schedule) in enumerate(optim["group_schedules"])
    ]


def complete_decay_schedule(optim: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `optim.decay_schedule` complete, or {} without one. Raises `UserError`."""
    schema, given = SCHEMA["optim"]["schedule"], optim["decay_schedule"]
    if not given:
        return {}
    if not optim["weight_decay"]:
        raise UserError(
            "config.optim.decay_schedule multiplies config.optim.weight_decay, which is 0; write"
            " its first value, or leave the schedule out"
        )
    return check_section({**defaults(schema), **given}, schema, "optim.decay_schedule.")
