"""The task of `regression.py` as users wrote it before: without a base class, by earlier names."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from vit_jax import models


@dataclasses.dataclass(frozen=True)
class Task:
    """Squared error of one output; `rmse` and, from every example, the rank correlation."""

    model: object
    info: object
    scale: float = 10.0

    headline = "rank_correlation"
    pictured = 4

    @classmethod
    def create(cls, model, info, **fields):
        return cls(models.build(**{"num_classes": 1, **model}), info, **fields)

    def init(self, key):
        images = jnp.zeros((1, *self.info.spec["image"].shape))
        return self.model.init(key, images)["params"]

    def perturb(self, batch, key):
        return {"image": self.inputs(batch), "label": batch["label"]}

    def inputs(self, batch):
        return jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1

    def objective(self, params, batch, key):
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

    def captions(self, examples):
        return [f"{value:.1f}" for value in examples["value"]]

    def lines(self, examples, top):
        return [[caption] for caption in self.captions(examples)]

    def pictures(self, examples):
        return list(examples["image"])

    def sections(self, examples):
        return []
