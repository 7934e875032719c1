"""Evaluation by the mean over examples of an error that a task predicts with its other answers."""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from vit_jax.tasks._base import BaseTask
from vit_jax.types import Array, Batch, Params


class MeanErrorTask(BaseTask):
    """A task whose `predict` answers `error`, float32 `[batch]`, and whose headline is its mean."""

    learns_classes: ClassVar[bool] = False

    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the sum of the examples' errors, and their number."""
        real = batch["mask"] > 0
        errors = self.predict(params, batch)["error"]
        return {
            "error": jnp.where(real, errors, 0.0).sum(),
            "examples": real.sum(dtype=jnp.int32),
        }

    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the mean error under the name of the headline, and `num_examples`."""
        examples = int(found["examples"])
        mean = float(found["error"]) / max(examples, 1)
        return {self.headline: mean, "num_examples": examples}

    def summaries(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the error of each example in words."""
        return [f"error {error:.3f}" for error in examples["error"]]

    def result_lines(self, examples: Mapping[str, np.ndarray], top: int) -> list[list[str]]:
        """Returns the error of each example, whatever `top` is."""
        del top
        return [[line] for line in self.summaries(examples)]
