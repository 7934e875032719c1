"""The stages of a run: settings that hold until a time of it (`config.stages`).

A stage names the keys in which it differs from the config itself, which holds after the last stage.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config.durations import durations, parse_duration
from vit_jax.config.schema import FIXED, FREE, SCHEMA
from vit_jax.config.stored import flatten, on_resume
from vit_jax.errors import UserError, quoted

UNTIL = "until"

# A resume may change them, but the durations of the whole run and the process depend on them.
_OF_THE_RUN = ("total", "precision", "stages")

# No result depends on them, but the program of a step does.
_OF_THE_STEP = ("model.remat", "model.unroll", "model.attention")


def title(name: str) -> str:
    """Returns the words for a stage on the console; its name is "" for the config itself."""
    return f"stage {name}" if name else "last stage (the config itself)"


def name_at(config: ConfigDict, num_examples: int, step: int) -> str:
    """Returns the name of the stage of a step; "" for the config itself.

    num_examples: the number of training examples.
    """
    duration = durations(config, num_examples)
    ends = {
        duration(stage[UNTIL], f"stages.{name}.{UNTIL}"): name
        for name, stage in config.stages.items()
    }
    return next((ends[end] for end in sorted(ends) if step <= end), "")


def place_of(given: Mapping[str, Any], name: str, key: str) -> str:
    """Returns where the value of a dotted key comes from in a stage: its own section or the config.

    given: the whole config. name: the name of the stage; "" for the config itself.
    """
    own = dict(flatten(given["stages"][name])) if name else {}
    return f"stages.{name}.{key}" if key in own else key


def settings(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the whole config of one stage: `given`, with the stage's own keys in their places.

    A key, and a field of a model or task, is replaced whole.

    Raises:
      UserError: the stage is no section, or does not say when it ends.
    """
    stage = given["stages"][name]
    if not isinstance(stage, Mapping) or UNTIL not in stage:
        raise UserError(
            f"config.stages.{name}={quoted(stage)}: write a section with `until`, the time at which"
            " the stage ends, such as '40%', and the keys that it changes"
        )
    parse_duration(stage[UNTIL], f"stages.{name}.{UNTIL}")
    own = {key: value for key, value in stage.items() if key != UNTIL}
    return {**_replaced(given, own, SCHEMA), "stages": {}}


def _replaced(
    given: Mapping[str, Any], own: Mapping[str, Any], schema: Mapping[str, Any]
) -> dict[str, Any]:
    result = dict(given)
    for name, value in own.items():
        entry = schema.get(name)
        inner = entry if isinstance(entry, Mapping) else {}
        is_section = bool(inner) or getattr(entry, "kind", "") == "open"
        is_merged = is_section and isinstance(value, Mapping)
        result[name] = _replaced(given[name], value, inner) if is_merged else value
    return result


def check_keys(name: str, stage: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises a `UserError` if a stage sets a known key that cannot change during a run.

    given: the whole config.
    """
    own = dict(flatten(given))
    for path, value in flatten(stage):
        effect, section = on_resume(path), path.partition(".")[0]
        if path == UNTIL or (path in own and value == own[path]):
            continue
        if effect == FIXED:
            raise UserError(
                f"config.stages.{name}.{path}: a stage cannot change it, because checkpoints or the"
                f" order of the images depend on it; write config.{path}, for the whole run"
            )
        is_unread = effect == FREE and path not in _OF_THE_STEP
        # The first state holds the networks of a task, such as a teacher.
        is_loaded = section == "task" and path.endswith(".checkpoint")
        if section in _OF_THE_RUN or is_unread or is_loaded:
            raise UserError(
                f"config.stages.{name}.{path}: a stage cannot change it, because it holds for the"
                f" whole run; write config.{path}"
            )
