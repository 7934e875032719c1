"""Distillation: a student that also answers to a frozen teacher."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.plugins import check_known
from vit_jax.types import TEACHER, Array, Params

KINDS = ("soft", "hard")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What `config.task.distill` describes.

    The teacher sees what the student sees, mixed and erased images included ("function matching",
    Beyer et al. 2022, arXiv:2106.05237), without dropout. Its parameters are kept beside the
    student's, below `teacher/`: they are sharded, saved and resumed with them, and never trained.

    model: the fields of the teacher's model, `name` among them. checkpoint: of any format.
    kind: "soft" compares probabilities at `temperature` (Hinton et al. 2015), "hard" takes the
      teacher's first class for the truth (Touvron et al. 2021, DeiT, section 4).
    weight: share of this loss; the labels' loss has the rest.
    """

    network: nn.Module
    checkpoint: str
    kind: str = "soft"
    weight: float = 0.5
    temperature: float = 1.0

    @classmethod
    def create(cls, keys: Mapping[str, Any], num_classes: int) -> "Teacher":
        """The teacher for a student of so many classes. Raises `UserError`."""
        known = {"model", *(field.name for field in dataclasses.fields(cls))} - {"network"}
        for key in keys:
            check_known(key, known, f"config.task.distill.{key}")
        for key in ("model", "checkpoint"):
            if not keys.get(key):
                raise UserError(
                    f"config.task.distill.{key} is missing; write model={{'name': ...}} and"
                    " checkpoint=PATH"
                )
        fields = dict(keys)
        model = fields.pop("model")
        if isinstance(model, str) or "name" not in model:
            raise UserError("config.task.distill.model: write {'name': NAME, field: value, ...}")
        teacher = cls(models.build(**{"num_classes": num_classes, **model}), **fields)
        if teacher.kind not in KINDS:
            raise UserError(f"config.task.distill.kind={teacher.kind!r}: write soft or hard")
        if not 0 < teacher.weight <= 1:
            raise UserError(f"config.task.distill.weight={teacher.weight}: write 0 to 1, not 0")
        if not teacher.temperature > 0:
            raise UserError(f"config.task.distill.temperature={teacher.temperature}: not positive")
        return teacher

    def losses(self, logits: Array, params: Params, images: Array) -> Array:
        """How far the student's `logits` `[b, classes]` are from the teacher's: float32 `[b]`.

        soft: T² · KL(teacher at T || student at T). hard: cross-entropy with the teacher's class.
        """
        frozen = jax.lax.stop_gradient(params[TEACHER])
        target = self.network.apply({"params": frozen}, images)
        if self.kind == "hard":
            answers = jnp.argmax(target, axis=-1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, answers)
        student, teacher = (jax.nn.log_softmax(x / self.temperature) for x in (logits, target))
        return self.temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(-1)
