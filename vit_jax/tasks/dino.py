"""DINO: self-distillation of images with multi-crop (Caron et al. 2021).

A student sees all crops of an image; a teacher, its moving average, sees the two large ones. The
student's answer to each crop predicts the teacher's to each other large crop. Centering keeps the
teacher from collapsing. An example has `global` `[2, h, w, channels]` and `local` `[crops, h, w,
channels]`; the preprocessing op `views` makes them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vit_jax.augment.images import normalize
from vit_jax.config.durations import Duration
from vit_jax.models.heads.prototypes import PrototypeHead
from vit_jax.models.heads.self_distillation import SelfDistillation
from vit_jax.optim import method_schedules
from vit_jax.tasks import dinov2
from vit_jax.tasks._teacher import averaged
from vit_jax.tasks.losses import prototypes
from vit_jax.types import Array, Batch, Params


def _off(value: float | str) -> dataclasses.Field:
    """Returns a field of DINOv2 that DINO does not have, with the value that switches it off."""
    return dataclasses.field(default=value, init=False)


@dataclasses.dataclass(frozen=True)
class Task(dinov2.Task):
    """The loss of DINO: DINOv2's of class tokens alone, whose teacher is centered.

    Attributes:
      num_prototypes, head_depth, head_hidden, head_bottleneck, student_temperature, momentum,
        center_momentum: see `dinov2.Task`.
      temperature: of the teacher's logits, in the first epoch and after `temperature_warmup`, a
        duration. It changes between epochs.
      epoch_steps: of the schedule of the temperature, which training fills in.
    """

    temperature: tuple[float, float] = (0.04, 0.04)
    temperature_warmup: int | str = 0
    momentum: tuple[float, float] = (0.996, 1.0)
    epoch_steps: int = 1
    teacher: str = _off("centering")
    ibot_prototypes: int = _off(0)
    ibot_hidden: int = _off(0)
    ibot_bottleneck: int = _off(0)
    sinkhorn_iterations: int = _off(0)
    dino_weight: float = _off(1.0)
    ibot_weight: float = _off(0.0)
    koleo_weight: float = _off(0.0)
    mask_share: float = _off(0.0)
    mask_ratio: tuple[float, float] = _off((0.1, 0.5))
    mask_block: float = _off(0.0)

    def _network(self) -> SelfDistillation:
        sizes = {"hidden": self.head_hidden, "bottleneck": self.head_bottleneck}
        head = PrototypeHead(
            self.num_prototypes, depth=self.head_depth, dtype=self.model.dtype, **sizes
        )
        return SelfDistillation(self.model, head, masks=False)

    def with_duration(self, duration: Duration) -> "Task":
        """Returns the task whose schedules end with the run."""
        task = super().with_duration(duration)
        return dataclasses.replace(task, epoch_steps=duration("1 epoch"))

    def temperature_at(self, step: Array | int) -> Array:
        """Returns the teacher's temperature in the epoch of a step; it rises linearly."""
        first, last = self.temperature
        epochs = round(self.warmup_steps / self.epoch_steps)
        epoch = step // self.epoch_steps
        return last * method_schedules.dino(epoch, epochs, epochs, end=1.0, first=first / last)

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns normalized crops."""
        del key
        return {
            name: normalize(jnp.asarray(batch[name]), self.mean, self.std)
            for name in ("global", "local")
        }

    def init_state(self, params: Params, key: Array) -> Params:
        """Returns the teacher, which starts as the student, and the center, which starts at 0."""
        del key
        return {"teacher": params, "center": jnp.zeros(self.num_prototypes)}

    def add_targets(self, task_state: Params, batch: Batch, step: Array) -> Batch:
        """Adds the teacher's probabilities, and the center of the next step.

        `class_targets` are `[batch, 2, prototypes]`, with the crops swapped: crop 1 of the student
        predicts crop 2 of the teacher.
        """
        teacher, center = task_state["teacher"], task_state["center"]
        logits = self._logits(teacher, self._encode(teacher, batch["global"]).pooled)
        temperature = self.temperature_at(step).astype(jnp.float32)
        targets = prototypes.centered_probabilities(logits, center, temperature)
        new = prototypes.updated_center(center, logits, momentum=self.center_momentum)
        rows = jnp.broadcast_to(new, (len(logits), *new.shape))
        return {**batch, "class_targets": targets[:, ::-1], "center": rows}

    def next_state(self, task_state: Params, params: Params, batch: Batch, step: Array) -> Params:
        """Returns the teacher, moved towards the student, and the center with this batch."""
        teacher = averaged(task_state["teacher"], params, self.momentum_at(step))
        return {"teacher": teacher, "center": batch["center"][0]}

    def losses(self, params: Params, batch: Batch, key: Array) -> dict[str, Array]:
        """Returns the losses of each example, `local` and `global`, `[batch]`.

        Their sum is the mean over the pairs of a crop of the student and another of the teacher.
        """
        teacher = batch["class_targets"].swapaxes(0, 1)
        pairs = 2 + 2 * batch["local"].shape[1]
        keys = dict(zip(("global", "local"), jax.random.split(key), strict=True))

        def logits(name: str) -> Array:
            found = self._encode(params, batch[name], key=keys[name])
            return self._logits(params, found.pooled).swapaxes(0, 1)

        how = {"temperature": self.student_temperature}
        same = prototypes.cross_entropies(logits("global"), teacher, **how).sum(0)
        local = prototypes.crop_losses(logits("local"), teacher, **how)
        return {"local": local / pairs, "global": same / pairs}

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the examples' losses, their number) of a micro-batch."""
        losses = self.losses(params, batch, key)
        return (losses["local"] + losses["global"]).sum(), jnp.float32(len(losses["local"]))

    def _logits(self, params: Params, x: Array) -> Array:
        return self.model.apply({"params": params}, x, method="class_logits")
