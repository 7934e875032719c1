"""Trains any task with low-rank adapters; see `vit_jax.models.lora`."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.models import lora
from vit_jax.plugins import check_known
from vit_jax.tasks._base import BaseTask
from vit_jax.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A task whose parameters are supplemented by adapters.

    Only the training differs from that of `task`. Evaluation and prediction receive the merged
    parameters, so all other methods are those of `task`.

    Attributes:
      task: the task whose model is adapted.
      rank: the rank of the adapters.
      targets: a regular expression that matches the whole names of the adapted kernels.
    """

    task: BaseTask
    rank: int
    targets: str = lora.ATTENTION_AND_MLP

    @classmethod
    def create(cls, task: BaseTask, keys: Mapping[str, Any]) -> "Adapted":
        """Returns the task with the adapters that `config.task.lora` describes.

        Raises:
          UserError: a key is unknown, or has no such value.
        """
        if not isinstance(keys, Mapping | ConfigDict):
            raise UserError(f"config.task.lora={keys!r}: write {{'rank': 8}}")
        for key in keys:
            check_known(key, ("rank", "targets"), f"config.task.lora.{key}")
        rank = keys.get("rank")
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise UserError(f"config.task.lora.rank={rank!r}: write a whole number, such as 8")
        targets = keys.get("targets", lora.ATTENTION_AND_MLP)
        try:
            re.compile(targets)
        except (re.error, TypeError) as error:
            raise UserError(
                f"config.task.lora.targets={targets!r}: write one regular expression ({error})"
            ) from error
        return cls(task, **keys)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def init(self, key: Array) -> Params:
        """Returns the task's fresh parameters with adapters that change nothing yet."""
        params = self.task.init(key)
        key = jax.random.fold_in(key, 1)
        return {
            **params,
            lora.KEY: lora.init(key, params, rank=self.rank, targets=self.targets),
        }

    def frozen(self, params: Params, patterns: Sequence[str]) -> list[str]:
        """Returns `patterns`, or if there are none those of the towers that are adapted."""
        return self.task.frozen(params, patterns or lora.frozen(params))

    def with_duration(self, duration: Duration) -> "Adapted":
        """Returns the task for a run of a length, with the same adapters."""
        return dataclasses.replace(self, task=self.task.with_duration(duration))

    def init_state(self, params: Params, key: Array) -> Params:
        """Returns the task's own state, whose teacher is a model without adapters."""
        return self.task.init_state(lora.merge(params), key)

    def next_state(self, task_state: Params, params: Params, batch: Batch, step: Array) -> Params:
        """Returns the task's own state after a step, given the merged parameters."""
        return self.task.next_state(task_state, lora.merge(params), batch, step)

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns the task's loss of the merged parameters."""
        return self.task.loss_fn(lora.merge(params), batch, key)

    def loss_fn_of_parts(self, params: Params, parts: Batch, key: Array) -> tuple[Array, Array]:
        """Returns the task's loss of the merged parameters."""
        return self.task.loss_fn_of_parts(lora.merge(params), parts, key)

    def inference_params(self, params: Params) -> Params:
        """Returns the parameters of the model alone, with the adapters merged."""
        return self.task.inference_params(lora.merge(params))

    def with_texts(self, texts: Sequence[str]) -> "Adapted":
        """Returns the task that answers with one of `texts`, with the same adapters."""
        return dataclasses.replace(self, task=self.task.with_texts(texts))
