"""Tasks, such as classification, that a backbone is trained for.

A task is one module here (or outside, named `package.module:Class`) with a class `Task` that
follows `BaseTask`. It owns the meaning of the batch, the head, the augmentation on the device, the
loss, the metrics and the sections of the report. The loop, the step and the evaluation do not
depend on any particular task.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax

from vit_jax.errors import UserError
from vit_jax.plugins import Kind, check_fields, check_known, is_foreign
from vit_jax.tasks._adapters import Adapted
from vit_jax.tasks._base import BaseTask, completed
from vit_jax.tasks._checks import check_not_negative
from vit_jax.tracking.metrics import PROBES, Metric
from vit_jax.types import DataInfo, Params

__all__ = ["Adapted", "BaseTask", "abstract_params", "boxed_params", "build", "metric_info"]


TASKS = Kind(
    "task",
    "vit_jax.tasks",
    "Task",
    "package.module:Class",
    accepts=lambda found: isinstance(found, type) and dataclasses.is_dataclass(found),
)
"""The finder of tasks by the name in `config.task.name`."""


def build(task: Mapping[str, Any], model: Mapping[str, Any], info: DataInfo) -> BaseTask:
    """Returns the task that `config.task` describes, around the backbone of `config.model`.

    Raises:
      UserError: a task, task field, model or model field is unknown, or the data does not fit.
    """
    fields = dict(task)
    name, adapters = fields.pop("name"), fields.pop("lora", None)
    task_class = completed(TASKS.find(name, "config.task.name"))
    known = {field.name for field in dataclasses.fields(task_class) if field.init} | {"lora"}
    for field in fields:
        known_here = known - {"model", "info", *task_class.filled_in}
        check_known(field, known_here, f"config.task.{field}", f"field of task {name!r}")
    check_fields(task_class, fields, "config.task.")
    if not is_foreign(name):  # None of ours has a whole number below 0.
        check_not_negative(**{key: x for key, x in fields.items() if isinstance(x, int)})
    if adapters and fields.get("distill"):
        raise UserError("config.task: lora and distill cannot go together; leave one out")
    built = task_class.create(model, info, **fields)
    # All that `Adapted` does not define itself are the methods and fields of the task.
    return cast(BaseTask, Adapted.create(built, adapters)) if adapters else built


def metric_info(name: str) -> Mapping[str, Metric]:
    """Returns the declarations of the metrics of the task called `name`, and those of probes.

    Raises:
      UserError: there is no such task.
    """
    return {**PROBES, **completed(TASKS.find(name, "config.task.name")).metric_info}


def abstract_params(task: BaseTask) -> Params:
    """Returns the shapes of the parameters; nothing is computed."""
    return nn.unbox(boxed_params(task))


def boxed_params(task: BaseTask) -> Params:
    """Returns the shapes of the parameters, in boxes with their logical axis names."""
    return jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))
