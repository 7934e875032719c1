"""Tasks: what a backbone is trained to do.

A task is one module here (or outside, named `package.module:Class`) whose class `Task` follows
`TaskProtocol`. It owns the meaning of the batch, the head, on-device perturbation, the loss, the
metrics and what the report shows; the loop, the step and the evaluation know nothing of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import jax
import numpy as np

from vit_jax.errors import UserError
from vit_jax.plugins import Kind, check_fields, check_known
from vit_jax.tasks._adapters import Adapted
from vit_jax.tracking.metrics import Metric
from vit_jax.types import Array, Batch, DataInfo, Params


class TaskProtocol(Protocol):
    """The contract between a task and the step, the evaluation and the report.

    A task may also have `precompute(params)`: arrays, by name, that `eval_sums`, `eval_rows` and
    `predict` then find among the parameters, so that every batch need not make them; and
    `answering(texts)`: the task with texts of the user's in the place of its classes.
    """

    model: nn.Module

    def init(self, key: Array) -> Params:
        """Fresh parameters, boxed with their logical axis names."""

    def perturb(self, batch: Batch, key: Array) -> Batch:
        """Training only, on the device, over the global batch: mixing, erasing."""

    def objective(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """(sum of losses, number of terms) of a training micro-batch, float32 scalars."""

    def inputs(self, batch: Batch) -> Array:
        """The images of a batch from the pipeline, as the model takes them."""

    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Additive statistics of a batch; rows whose `mask` is 0 count for nothing."""

    def eval_rows(self, params: Params, batch: Batch) -> dict[str, Array]:
        """What metrics need of every example, leading axis the batch's; {} where sums suffice."""

    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Final scalars of a whole split.

        found: the statistics added up over it, and the rows of its examples in their order.
        """

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Per-example outputs that `sections` and the `predict` command show."""

    def captions(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """One line for each example, from what `predict` said of it."""

    def lines(self, examples: Mapping[str, np.ndarray], top: int) -> list[list[str]]:
        """What the `predict` command prints of each example: at most `top` lines."""

    def pictures(self, examples: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Each image with what was predicted drawn on it, uint8 `[h, w, 3 or 1]`."""

    def sections(self, examples: Mapping[str, np.ndarray]) -> list:
        """Report sections from the examples of a split and their predictions, joined by name."""

    headline: str
    """The metric that names a run's quality, such as `accuracy`."""

    metric_info: ClassVar[Mapping[str, Metric]]
    """The direction and unit of each metric; see `vit_jax.tracking.metrics`. A task may have none.

    An attribute of the class, because it is read before the task is built.
    """

    pictured: int
    """Examples that `sections` is given, at most."""


TASKS = Kind(
    "task",
    "vit_jax.tasks",
    "Task",
    "package.module:Class",
    accepts=lambda found: isinstance(found, type) and dataclasses.is_dataclass(found),
    requires=("create", "init", "objective", "predict"),
)
"""Where `config.task.name` is looked for."""


def build(task: Mapping[str, Any], model: Mapping[str, Any], info: DataInfo) -> TaskProtocol:
    """The task that `config.task` describes, around the backbone of `config.model`.

    Raises:
      UserError: unknown task, task field, model or model field; data that does not fit the task.
    """
    fields = dict(task)
    name, adapters = fields.pop("name"), fields.pop("lora", None)
    task_class = TASKS.find(name, "config.task.name")
    known = {field.name for field in dataclasses.fields(task_class) if field.init} | {"lora"}
    for field in fields:
        known_here = known - {"model", "info"}
        check_known(field, known_here, f"config.task.{field}", f"field of task {name!r}")
    check_fields(task_class, fields, "config.task.")
    if adapters and fields.get("distill"):
        raise UserError("config.task: lora and distill cannot go together; leave one out")
    built = task_class.create(model, info, **fields)
    return Adapted.create(built, adapters) if adapters else built


def metric_info(name: str) -> Mapping[str, Metric]:
    """Returns what the task called `name` declares of its metrics, as its class has it.

    Raises:
      UserError: there is no such task.
    """
    return getattr(TASKS.find(name, "config.task.name"), "metric_info", {})


def abstract_params(task: TaskProtocol) -> Params:
    """Shapes of the parameters; nothing is computed."""
    return nn.unbox(boxed_params(task))


def boxed_params(task: TaskProtocol) -> Params:
    """Shapes of the parameters, in boxes with their logical axis names."""
    return jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))


def precompute(task: TaskProtocol, params: Params) -> Params:
    """What evaluation puts beside the parameters, the same for all batches; {} for most tasks."""
    own = getattr(task, "precompute", None)
    return own(params) if own else {}


def answering(task: TaskProtocol, texts: Sequence[str]) -> TaskProtocol:
    """The task whose answer is one of `texts`. Raises `UserError` where it reads no texts."""
    if isinstance(task, Adapted):
        return dataclasses.replace(task, task=answering(task.task, texts))
    own = getattr(task, "answering", None)
    if not own:
        raise UserError("--text is for runs that learned images and texts (task contrastive)")
    return own(texts)
