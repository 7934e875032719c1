"""Config files: every key with its default, how files are read, overridden, checked, compared."""

from vit_jax.config.loading import (
    VERSION,
    apply_overrides,
    changes,
    default_config,
    describe,
    flatten,
    load,
    migrate,
    parse_arg,
    parse_values,
    set_key,
    validate,
)

__all__ = [
    "VERSION",
    "apply_overrides",
    "changes",
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
