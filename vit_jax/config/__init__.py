"""Configs: every key with its default; how files are read, overridden, checked and compared."""

from vit_jax.config.loading import (
    apply_overrides,
    default_config,
    describe,
    load,
    parse_arg,
    parse_values,
    set_key,
)
from vit_jax.config.stored import VERSION, changes, check_trust, flatten, migrate
from vit_jax.config.validation import validate

__all__ = [
    "VERSION",
    "apply_overrides",
    "changes",
    "check_trust",
    "default_config",
    "describe",
    "flatten",
    "load",
    "migrate",
    "parse_arg",
    "parse_values",
    "set_key",
    "validate",
]
