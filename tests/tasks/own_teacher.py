"""A task of a user's own that keeps a teacher and a center from step to step.

The student learns from the label, and to agree with a teacher that is its moving average. Named
`own_teacher:Task` in a config.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vit_jax.tasks import classification

MOMENTUM = 0.5


@dataclasses.dataclass(frozen=True)
class Task(classification.Task):
    """Classification with a mean teacher (Tarvainen & Valpola 2017) and a center of its logits."""

    pull_after: str = "50 percent"
    pull_from: int = 0

    def with_duration(self, duration):
        return dataclasses.replace(self, pull_from=duration(self.pull_after))

    def init_state(self, params, key):
        del key
        return {"teacher": params, "center": jnp.zeros(self.info.num_classes)}

    def add_targets(self, task_state, batch, step):
        logits = self.model.apply({"params": task_state["teacher"]}, batch["image"])
        pull = jnp.where(step < self.pull_from, 0.0, 1.0)
        return {
            **batch,
            "teacher_logits": logits,
            "centered": logits - task_state["center"][None],
            "pull": jnp.full(len(logits), pull),
        }

    def next_state(self, task_state, params, batch, step):
        del step

        def average(old, new):
            return MOMENTUM * old + (1 - MOMENTUM) * new

        return {
            "teacher": jax.tree.map(average, task_state["teacher"], params),
            "center": average(task_state["center"], batch["teacher_logits"].mean(0)),
        }

    def step_metrics(self, task_state, batch):
        return {"center_norm": jnp.linalg.norm(task_state["center"])}

    def loss_fn(self, params, batch, key):
        total, count = super().loss_fn(params, batch, key)
        logits = self.model.apply({"params": params}, batch["image"])
        errors = jnp.square(logits - batch["centered"]).mean(-1)
        return total + (batch["pull"] * errors).sum(), count
