"""A task of a user's own: the public contract and nothing else of the package's inside.

Regresses the label as a number: named `tests.tasks.regression:Task` in a config.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from vit_jax.tasks import BaseTask
from vit_jax.tracking import Metric


@dataclasses.dataclass(frozen=True)
class Task(BaseTask):
    """Squared error of one output; `rmse` and, from every example, the rank correlation."""

    scale: float = 10.0
    mixup: float = 0.0

    headline = "rank_correlation"
    metric_info: ClassVar = {
        "rmse": Metric(higher_is_better=False),
        "rank_correlation": Metric(higher_is_better=True),
        "num_examples": Metric(unit="count"),
    }

    @classmethod
    def create(cls, model, info, **fields):
        return super().create({"num_classes": 1, **model}, info, **fields)

    def loss_fn(self, params, batch, key):
        said = self.model.apply(
            {"params": params}, batch["image"], train=True, rngs={"dropout": key}
        )
        errors = (said[:, 0] - batch["label"] / self.scale) ** 2
        return errors.sum(), jnp.float32(len(errors))

    def predict(self, params, batch):
        said = self.model.apply({"params": params}, self.inputs(batch))
        return {"value": said[:, 0] * self.scale}

    def eval_sums(self, params, batch):
        errors = (self.predict(params, batch)["value"] - batch["label"]) ** 2
        return {
            "squares": jnp.where(batch["mask"] > 0, errors, 0).sum(),
            "examples": (batch["mask"] > 0).sum(dtype=jnp.int32),
        }

    def eval_rows(self, params, batch):
        return {"truth": jnp.asarray(batch["label"]), **self.predict(params, batch)}

    def metrics(self, found):
        ranks = [np.argsort(np.argsort(found[name])) for name in ("truth", "value")]
        return {
            "rmse": float(np.sqrt(found["squares"] / found["examples"])),
            "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
            "num_examples": int(found["examples"]),
        }
