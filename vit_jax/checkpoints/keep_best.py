"""The checkpoint that is the best by a metric is kept beside the newest."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vit_jax.checkpoints import manifest
from vit_jax.errors import UserError


@dataclasses.dataclass
class KeepBest:
    """Keeps the checkpoint that is the best by one metric, over all attempts at a run.

    Orbax forgets the metrics of a checkpoint when the process ends; the manifests hold them.
    """

    directory: epath.Path
    name: str
    choose: Callable[..., int | None]
    values: dict[int, float] = dataclasses.field(default_factory=dict)

    def should_preserve(
        self,
        checkpoints: Sequence[Any],
        *,
        context: preservation_policy.PreservationContext,
    ) -> list[bool]:
        """Returns which of the checkpoints to keep, as Orbax asks its policies."""
        del context
        best = self.best({checkpoint.step: checkpoint.metrics for checkpoint in checkpoints})
        return [checkpoint.step == best for checkpoint in checkpoints]

    def best(self, steps: Mapping[int, Mapping[str, float] | None]) -> int | None:
        """Returns the best of some steps; None if none of them has the metric as a number.

        steps: the metrics of each step, or None for those in its manifest.
        """
        for step, metrics in steps.items():
            if step not in self.values:
                self.values[step] = (metrics or self._read(step)).get(self.name, math.nan)
        numbers = [step for step in steps if not math.isnan(self.values[step])]
        return self.choose(numbers, key=self.values.get, default=None)

    def _read(self, step: int) -> Mapping[str, float]:
        try:
            return manifest.read(self.directory / str(step)).metrics
        except UserError:  # Damaged, or not yet in its place.
            return {}
