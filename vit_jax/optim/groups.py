"""The settings of each parameter: decay, learning-rate multiplier, schedule, and freezing.

Parameters are named by their path in the tree, joined with "/". A pattern must match the whole
name. If several patterns are listed, the first match decides. A pattern that decides nothing is a
mistake and raises an error.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from vit_jax.config.validation import check_pattern
from vit_jax.errors import UserError, quoted
from vit_jax.types import Params

STUDENTS = "students"
"""The prefix of the names of further students' parameters; the name of a student follows it."""


class Group(NamedTuple):
    """The optimizer's settings of one parameter; `Optimizer.describe` returns a table of them."""

    path: str
    shape: tuple[int, ...]
    decay: float  # multiple of config.optim.weight_decay, 0 where the mask leaves it out
    lr_mult: float | tuple[float, ...]  # a tuple has one entry a layer, along the first axis
    schedule: int | None  # index in config.optim.group_schedules; None is the main schedule
    frozen: bool
    late: int | None = None  # index in config.optim.freeze_until


class Layer(NamedTuple):
    """The block of a parameter: its number of `depth` blocks; None if all `depth` are stacked."""

    number: int | None
    depth: int


def name_of(path: Sequence[Any]) -> str:
    """Returns the name of a leaf, such as "head/kernel", from its `jax.tree_util` key path."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name, in the order of the tree."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def group_parameters(spec: Mapping[str, Any], params: Params) -> dict[str, Group]:
    """Returns the group of every parameter by name, in the order of the tree.

    Only the shapes of `params` are used.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in named_leaves(params).items()}
    decayed = _decayed(spec, shapes)
    decay_mults = _first_values(spec["decay_mults"], shapes, "decay_mults", default=1.0)
    lr_mults = _first_values(spec["lr_mults"], shapes, "lr_mults", default=1.0)
    schedules = [[pattern, i] for i, (pattern, _) in enumerate(spec["group_schedules"])]
    schedule_of = _first_values(schedules, shapes, "group_schedules", default=None)
    freeze = [[pattern, True] for pattern in spec["freeze"]]
    frozen = _first_values(freeze, shapes, "freeze", default=False)
    until = [[pattern, i] for i, (pattern, _) in enumerate(spec["freeze_until"])]
    late = _first_values(until, shapes, "freeze_until", default=None)
    if all(frozen.values()):
        raise UserError("config.optim.freeze: every parameter is frozen; leave one to train")
    trained = {path: shape for path, shape in shapes.items() if not frozen[path]}
    layer_mults = dict.fromkeys(shapes, 1.0) | _layer_multipliers(spec, trained)
    return {
        path: Group(
            path=path,
            shape=shape,
            decay=decay_mults[path] if path in decayed else 0.0,
            lr_mult=_times(layer_mults[path], lr_mults[path]),
            schedule=schedule_of[path],
            frozen=frozen[path],
            late=late[path],
        )
        for path, shape in shapes.items()
    }


def layers_of(shapes: Mapping[str, tuple[int, ...]], blocks: str) -> dict[str, Layer]:
    """Returns the layer of every parameter that `blocks` matches (see `blocks` in the config)."""
    pattern = block_pattern(blocks)
    matches = {path: pattern.fullmatch(path) for path in shapes}
    numbered = {path: match.group(1) for path, match in matches.items() if match}
    odd = next((n for n in numbered.values() if n is not None and not n.isdecimal()), None)
    if odd is not None:
        raise UserError(
            f"config.optim.blocks={quoted(blocks)}: its group matches {odd!r}, which is no number"
        )
    depth = 1 + max((int(n) for n in numbered.values() if n is not None), default=-1)
    return {
        path: Layer(None, shapes[path][0]) if number is None else Layer(int(number), depth)
        for path, number in numbered.items()
    }


def block_pattern(blocks: str) -> re.Pattern[str]:
    """Returns `config.optim.blocks`, compiled. Raises `UserError` unless it has a group."""
    pattern = check_pattern(blocks, "config.optim.blocks")
    if not pattern.groups:
        raise UserError(
            f"config.optim.blocks={quoted(blocks)}: put the number of the block in a group, as in"
            r" layers_(\d+)/.*, or write the group (\d+)? where blocks are stacked along one axis"
        )
    return pattern


def is_stacked(name: str, blocks: str) -> bool:
    """Returns whether the first axis of a parameter is the layer, by the pattern `blocks`."""
    match = re.fullmatch(blocks, name)
    return match is not None and match.group(1) is None


def _decayed(spec: Mapping[str, Any], paths: Iterable[str]) -> set[str]:
    mask = check_pattern(spec["decay_mask"], "config.optim.decay_mask")
    decayed = {path for path in paths if mask.fullmatch(path)}
    if spec["weight_decay"] and not decayed:
        raise _matches_nothing(spec["decay_mask"], "decay_mask", paths)
    return decayed


def _first_values(
    rules: Sequence[Sequence[Any]], paths: Iterable[str], key: str, *, default: Any
) -> dict[str, Any]:
    """Returns, for each path, the value of the first rule `[pattern, value]` that matches it.

    Raises:
      UserError: a rule decides the value of no path.
    """
    compiled = [check_pattern(pattern, f"config.optim.{key}") for pattern, _ in rules]
    values, used = {}, set()
    for path in paths:
        first = next((i for i, pattern in enumerate(compiled) if pattern.fullmatch(path)), None)
        values[path] = default if first is None else rules[first][1]
        used.add(first)
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            if any(compiled[i].fullmatch(path) for path in paths):
                raise UserError(
                    f"config.optim.{key}: {pattern!r} is never reached, the patterns before it "
                    "match all that it does; put it first"
                )
            raise _matches_nothing(pattern, key, paths)
    return values


def _matches_nothing(pattern: str, key: str, paths: Iterable[str]) -> UserError:
    shown = sorted(paths)[:3]
    return UserError(
        f"config.optim.{key}: {pattern!r} matches no whole parameter name; "
        f"names look like {', '.join(shown)}"
    )


def _layer_multipliers(
    spec: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, float | tuple[float, ...]]:
    """Returns rate^(depth + 1 - layer) for each parameter.

    The stem is layer 0, the blocks are layers 1 to depth, and the rest is layer depth + 1.
    """
    rate = spec["layer_decay"]
    if rate == 1:
        return dict.fromkeys(shapes, 1.0)
    layers = layers_of(shapes, spec["blocks"])
    depths = {layer.depth for layer in layers.values()}
    if len(depths) != 1:
        found = f"blocks of depths {sorted(depths)}" if depths else "no blocks"
        raise UserError(
            f"config.optim.layer_decay: {found} found by config.optim.blocks; it needs one stack "
            "of blocks; use lr_mults instead"
        )
    depth = depths.pop()
    stem = check_pattern(spec["stem"], "config.optim.stem")

    def multiplier(path: str) -> float | tuple[float, ...]:
        if path not in layers:
            return rate ** (depth + 1) if stem.fullmatch(path) else 1.0
        index = layers[path].number
        if index is None:
            return tuple(rate ** (depth - i) for i in range(depth))
        return rate ** (depth - index)

    return {path: multiplier(path) for path in shapes}


def _times(multiplier: float | tuple[float, ...], factor: float) -> float | tuple[float, ...]:
    if isinstance(multiplier, tuple):
        return tuple(m * factor for m in multiplier)
    return multiplier * factor
