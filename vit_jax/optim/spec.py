"""Checks `config.optim`: only known keys, of the right kind, with possible values."""

from collections.abc import Mapping
from typing import Any

from vit_jax.config import schema
from vit_jax.errors import UserError
from vit_jax.plugins import check_known

DEFAULTS = schema.section_defaults("optim")
"""The keys, and the values they have where a config is silent; documented in `vit_jax.config`."""

# Keys of a schedule that hold a length of time, in any unit the config knows.
DURATIONS = ("warmup", "cooldown", "timescale", "boundaries")


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` over `DEFAULTS`, in plain dicts and lists; unknown keys, impossible values raise."""
    spec = _merge(DEFAULTS, _plain(config), "config.optim")
    spec["group_schedules"] = [
        [pattern, _merge(DEFAULTS["schedule"], schedule, f"config.optim.group_schedules[{i}]")]
        for i, (pattern, schedule) in enumerate(_pairs(spec, "group_schedules"))
    ]
    for key in ("lr_mults", "decay_mults"):
        spec[key] = _pairs(spec, key)
        for pattern, multiplier in spec[key]:
            if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
                raise UserError(
                    f"config.optim.{key}: a number is needed for {pattern!r}, got {multiplier!r}"
                )
    for key in ("lr", "weight_decay", "clip_norm", "sam_rho"):
        if not spec[key] >= 0:
            raise UserError(f"config.optim.{key}: must not be negative, got {spec[key]}")
    if not 0 < spec["layer_decay"] <= 1:
        raise UserError(
            f"config.optim.layer_decay: {spec['layer_decay']} is not in (0, 1]; 1 is off"
        )
    coupling = spec["decay_coupling"]
    check_known(coupling, ("lr", "schedule"), f"config.optim.decay_coupling={coupling!r}")
    return spec


def _merge(defaults: Mapping[str, Any], given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: a mapping is needed, got {given!r}")
    for key in given:
        check_known(key, defaults, f"{where}.{key}")
    for key, value in given.items():
        _check_type(value, key, defaults[key], f"{where}.{key}")
    merged = {**defaults, **given}
    if "schedule" in defaults:
        merged["schedule"] = _merge(defaults["schedule"], merged["schedule"], f"{where}.schedule")
    return merged


def _check_type(value: Any, key: str, default: Any, where: str) -> None:
    """Raises unless `value` is of the kind of `default`; lengths of time may be strings too."""
    kind = next(kind for kind in (Mapping, list, str, (int, float)) if isinstance(default, kind))
    words = {Mapping: "a mapping", list: "a list", str: "a string", (int, float): "a number"}
    if key in DURATIONS and isinstance(value, str):
        return
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {words[kind]} is needed, got {value!r}")


def _pairs(spec: Mapping[str, Any], key: str) -> list[list[Any]]:
    pairs = [list(pair) if isinstance(pair, list) else [pair] for pair in spec[key]]
    for pair in pairs:
        if len(pair) != 2:
            raise UserError(f"config.optim.{key}: entries are [regex, value], got {pair}")
    return pairs


def _plain(value: Any) -> Any:
    """Mappings of any kind (`ConfigDict` is no `Mapping`) as dicts, sequences as lists."""
    if hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
