"""DINO: self-distillation of images with multi-crop (Caron et al. 2021).

The student's answer to each crop predicts the teacher's to each other large crop. Centering keeps
the teacher from collapsing. See `_self_distillation` for the crops.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.config.durations import Duration
from vit_jax.models.heads.self_distillation import SelfDistillation
from vit_jax.tasks._self_distillation import VIEWS, SelfDistillationTask
from vit_jax.tasks.losses import prototypes
from vit_jax.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Task(SelfDistillationTask):
    """The loss of DINO.

    Attributes (see `SelfDistillationTask` for others):
      temperature: that of the teacher's logits, in the first epoch and after `temperature_warmup`,
        a duration. It changes between epochs.
      epoch_steps: the length of an epoch, which training fills in.
    """

    temperature: tuple[float, float] = (0.04, 0.04)
    epoch_steps: int = 1

    filled_in = (*SelfDistillationTask.filled_in, "epoch_steps")

    def network(self) -> SelfDistillation:
        """Returns the backbone with one head, and no token for masked patches."""
        head = self.head(self.num_prototypes, self.head_hidden, self.head_bottleneck)
        return SelfDistillation(self.model, head, masks=False)

    def with_duration(self, duration: Duration) -> "Task":
        """Returns the task whose schedules end with the run."""
        task = super().with_duration(duration)
        return dataclasses.replace(task, epoch_steps=duration("1 epoch"))

    def temperature_at(self, step: Array | int) -> Array:
        """Returns the teacher's temperature in the epoch of a step; it rises linearly.

        A warm-up that is shorter than an epoch lasts for the whole first epoch.
        """
        epochs = max(1, round(self.warmup_steps / self.epoch_steps)) if self.warmup_steps else 0
        return self.ramp(step // self.epoch_steps, epochs)

    def init_state(self, params: Params, key: Array) -> dict[str, Any]:
        """Returns the teacher, which starts as the student, and the center, which starts at 0."""
        return {**super().init_state(params, key), "center": jnp.zeros(self.num_prototypes)}

    def add_targets(self, task_state: Params, batch: Batch, step: Array) -> Batch:
        """Adds the teacher's logits and its probabilities of them, `[batch, 2, prototypes]`."""
        teacher = task_state["teacher"]
        logits = self.class_logits(teacher, self.encode(teacher, batch["global"]).pooled)
        temperature = self.temperature_at(step).astype(jnp.float32)
        targets = prototypes.centered_probabilities(logits, task_state["center"], temperature)
        return {**batch, "teacher_logits": logits, "class_targets": targets}

    def next_state(
        self, task_state: Params, params: Params, batch: Batch, step: Array
    ) -> dict[str, Any]:
        """Returns the teacher, moved towards the student, and the center with this batch."""
        logits = batch["teacher_logits"]
        center = prototypes.updated_center(
            task_state["center"], logits, momentum=self.center_momentum
        )
        return {**super().next_state(task_state, params, batch, step), "center": center}

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the examples' losses, their number) of a micro-batch.

        The loss of an example is the mean over the pairs of a crop of the student and another one
        of the teacher.
        """
        keys = jax.random.split(key)
        tokens = [
            self.encode(params, batch[name], key=own).pooled
            for name, own in zip(VIEWS, keys, strict=True)
        ]
        student = self.class_logits(params, jnp.concatenate(tokens, axis=1)).swapaxes(0, 1)
        teacher = batch["class_targets"].swapaxes(0, 1)
        losses = prototypes.crop_losses(
            student, teacher, temperature=self.student_temperature, skip_same=True
        )
        pairs = prototypes.num_pairs(len(student), len(teacher), skip_same=True)
        return losses.sum() / pairs, jnp.float32(len(losses))
