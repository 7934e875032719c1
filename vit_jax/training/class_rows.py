"""The rows of a head follow the names of the classes when a run starts from another run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from vit_jax import tasks
from vit_jax.checkpoints import MergeReport
from vit_jax.errors import UserError
from vit_jax.training.class_names import class_names, plain
from vit_jax.types import Params

_SHOWN = 3

_Path = tuple[str, ...]


def by_name(
    task: Any,
    names: Sequence[str],
    loaded: Params,
    fresh: Params,
    report: MergeReport,
    *,
    keep: bool,
) -> tuple[Params, MergeReport]:
    """Gives each class of a task the row of a loaded head that has its name.

    Args:
      names: the names of the classes that the loaded head was trained for, as many as the task's.
      loaded: the parameters with the head of the checkpoint.
      fresh: the same parameters with a new head, for the classes whose name is new.
      report: the account of the load, which gets a line about the rows.
      keep: the user insists on the head of the checkpoint.

    Raises:
      UserError: `keep`, and a class has no row; or the rows of this task's head are unknown.
    """
    before, after = [*map(plain, names)], [*map(plain, class_names(task))]
    rows = rows_by_name(before, after)
    new = [name for name, row in zip(after, rows, strict=True) if row is None]
    axes = _class_axes(task)
    if not axes or (new and keep):
        reason = f"no class {new[0]!r}" if new else "its classes in another order"
        raise UserError(f"the head cannot be kept: the checkpoint has {reason}; write head=zero")
    arrays, starts = map(flax.traverse_util.flatten_dict, (dict(loaded), dict(fresh)))
    for path, axis in axes.items():
        if path in arrays:
            arrays[path] = _arranged(arrays[path], starts[path], axis, rows)
    line = f"{len(after) - len(new)} of {len(after)} rows of the head kept, by their classes' names"
    if new:
        line += f"; new: {', '.join(new[:_SHOWN])}{', ...' if len(new) > _SHOWN else ''}"
    report = dataclasses.replace(report, notes=(*report.notes, line))
    return flax.traverse_util.unflatten_dict(arrays), report


def rows_by_name(before: Sequence[str], after: Sequence[str]) -> list[int | None]:
    """Returns, for each name of `after`, its place in `before`; None if it has none.

    The classes of one name, such as ImageNet's two cranes, keep their order.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(before):
        places.setdefault(name, []).append(place)
    return [places[name].pop(0) if places.get(name) else None for name in after]


def _arranged(
    loaded: np.ndarray, fresh: np.ndarray, axis: int, rows: Sequence[int | None]
) -> np.ndarray:
    """Returns the rows of `loaded` in a new order; rows that are None come from `fresh`.

    Rows behind those of the classes, such as that of "no object", stay as they are loaded.
    """
    source, start = np.moveaxis(loaded, axis, 0), np.moveaxis(fresh, axis, 0)
    arranged = source.copy()
    for number, row in enumerate(rows):
        arranged[number] = start[number] if row is None else source[row]
    return np.moveaxis(arranged, 0, axis)


def _class_axes(task: Any) -> Mapping[_Path, int]:
    """Returns the axis of classes of each parameter that has one: it grows by one with a class."""
    task = getattr(task, "task", task)  # Low-rank adapters wrap a task.
    try:
        model = task.model.clone(num_classes=task.model.num_classes + 1)
        larger = _shapes(dataclasses.replace(task, model=model))
    except (AttributeError, TypeError):
        return {}
    axes = {}
    for path, shape in _shapes(task).items():
        grown = [axis for axis, size in enumerate(shape) if larger[path][axis] == size + 1]
        if len(grown) == 1:
            axes[path] = grown[0]
    return axes


def _shapes(task: Any) -> Mapping[_Path, tuple[int, ...]]:
    flat = flax.traverse_util.flatten_dict(dict(tasks.abstract_params(task)))
    return {path: leaf.shape for path, leaf in flat.items()}
