"""`config.optim` with every key: missing keys get the defaults of the schema."""

from collections.abc import Mapping
from typing import Any

from vit_jax.config import schema
from vit_jax.config.validation import check_section, complete_decay_schedule, complete_schedules

DEFAULTS = schema.section_defaults("optim")
"""The default value of every key; `vit_jax.config` documents the keys."""


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `DEFAULTS` updated with `config`, as plain dicts and lists. Raises `UserError`."""
    given = _plain(config)
    if isinstance(given.get("schedule"), dict):
        given["schedule"] = {**DEFAULTS["schedule"], **given["schedule"]}
    resolved = check_section({**DEFAULTS, **given}, schema.SCHEMA["optim"], "optim.")
    completed = {
        "group_schedules": complete_schedules(resolved),
        "decay_schedule": complete_decay_schedule(resolved),
    }
    return {**resolved, **completed}


def _plain(value: Any) -> Any:
    """Returns mappings of any kind (`ConfigDict` is no `Mapping`) as dicts, sequences as lists."""
    if hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
