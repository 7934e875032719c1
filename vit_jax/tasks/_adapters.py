"""Any task, trained through low-rank adapters: see `vit_jax.models.lora`."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.models import lora
from vit_jax.plugins import check_known
from vit_jax.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A task whose parameters have adapters beside them; to the step it is a task like any other.

    Whatever takes parameters (`objective`, `eval_sums`, `predict`, ...) is given the merged ones.

    rank: of the adapters. targets: regular expression of the whole names of adapted kernels.
    """

    task: Any
    rank: int
    targets: str = lora.ATTENTION_AND_MLP

    @classmethod
    def create(cls, task: Any, keys: Mapping[str, Any]) -> "Adapted":
        """The task with the adapters that `config.task.lora` describes. Raises `UserError`."""
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

    def init(self, key: Array) -> Params:
        """The task's fresh parameters with adapters that change nothing yet."""
        params = self.task.init(key)
        key = jax.random.fold_in(key, 1)
        return {
            **params,
            lora.KEY: lora.init(key, params, rank=self.rank, targets=self.targets),
        }

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.task, name)
        if not inspect.ismethod(found) or "params" not in inspect.signature(found).parameters:
            return found

        @functools.wraps(found)
        def merged(params: Params, *args: Any, **kwargs: Any) -> Any:
            return found(lora.merge(params), *args, **kwargs)

        return merged
