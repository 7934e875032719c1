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
        for checkpoint in checkpoints:
            if checkpoint.step not in self.values:
                metrics = checkpoint.metrics or self._read(checkpoint.step)
                self.values[checkpoint.step] = metrics.get(self.name, math.nan)
        steps = [one.step for one in checkpoints if not math.isnan(self.values[one.step])]
        best = self.choose(steps, key=self.values.get, default=None)
        return [checkpoint.step == best for checkpoint in checkpoints]

    def _read(self, step: int) -> Mapping[str, float]:
        try:
            return manifest.read(self.directory / str(step)).metrics
        except UserError:  # Damaged, or not yet in its place.
            return {}
