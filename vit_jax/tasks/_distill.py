"""Distillation: a student learns to imitate a frozen teacher."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vit_jax import checkpoints, models
from vit_jax.errors import UserError
from vit_jax.models.published import TEACHER
from vit_jax.plugins import check_fields, check_known
from vit_jax.types import Array, Params

KINDS = ("soft", "hard")


def check_keys(keys: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises a `UserError` unless `config.task.distill` has a network, and only `known` keys."""
    for key in keys:
        check_known(key, known, f"config.task.distill.{key}")
    for key in ("model", "checkpoint"):
        if not keys.get(key):
            raise UserError(
                f"config.task.distill.{key} is missing; write model={{'name': ...}} and"
                " checkpoint=PATH"
            )


def check_model(where: str, model: Any) -> None:
    """Raises a `UserError` unless the key `where` of `config.task` names a model."""
    if not isinstance(model, Mapping | ConfigDict) or "name" not in model:
        raise UserError(f"config.task.{where}: write {{'name': NAME, field: value, ...}}")


def load_teacher(checkpoint: str, network: nn.Module, image_shape: tuple[int, ...]) -> Params:
    """Returns the parameters of a checkpoint, for images `(height, width, channels)`.

    Large arrays may stay in their file until each device reads its part.

    Raises:
      UserError: the checkpoint cannot be read, or belongs to another network.
    """
    sizes: Any = {"image_size": image_shape[:2], "channels": image_shape[2]}
    try:
        params, _ = checkpoints.load_with_report(
            checkpoint, network, head="keep", lazy=True, **sizes
        )
        return params
    except UserError as error:
        raise UserError(f"config.task.distill: {error}") from error


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The teacher that `config.task.distill` describes.

    The teacher sees the images of the student, mixed and erased ones included ("function matching",
    Beyer et al. 2022, arXiv:2106.05237), without dropout. Its parameters are stored with the
    student's, under `teacher/`. They are sharded, saved and restored with them, and never trained.

    Attributes:
      network: the teacher's model.
      checkpoint: its parameters, a checkpoint of any format.
      kind: "soft" compares probabilities at `temperature` (Hinton et al. 2015), "hard" uses the
        teacher's top class as the label (Touvron et al. 2021, DeiT, section 4).
      weight: the share of this loss; the loss of the labels has the rest.
      temperature: the divisor of both logits in the soft loss.
    """

    network: nn.Module
    checkpoint: str
    kind: str = "soft"
    weight: float = 0.5
    temperature: float = 1.0

    @classmethod
    def create(cls, keys: Mapping[str, Any], num_classes: int) -> "Teacher":
        """Returns the teacher for a student of `num_classes` classes.

        Args:
          keys: the fields of this class, with `model`, the name and fields of the teacher's model,
            in the place of `network`.
          num_classes: the number of classes of the labels.

        Raises:
          UserError: a key is unknown or missing, or has no such value.
        """
        known = {"model", *(field.name for field in dataclasses.fields(cls))} - {"network"}
        check_keys(keys, known)
        fields = dict(keys)
        model = fields.pop("model")
        check_fields(cls, fields, "config.task.distill.")
        check_model("distill.model", model)
        teacher = cls(models.build(**{"num_classes": num_classes, **model}), **fields)
        if teacher.kind not in KINDS:
            raise UserError(f"config.task.distill.kind={teacher.kind!r}: write soft or hard")
        if not 0 < teacher.weight <= 1:
            raise UserError(f"config.task.distill.weight={teacher.weight}: write 0 to 1, not 0")
        if not teacher.temperature > 0:
            raise UserError(
                f"config.task.distill.temperature={teacher.temperature}: write a number above 0"
            )
        return teacher

    def load(self, image_shape: tuple[int, ...]) -> Params:
        """Returns the parameters of the checkpoint, for images `(height, width, channels)`.

        Raises:
          UserError: the checkpoint cannot be read, or belongs to another model.
        """
        return load_teacher(self.checkpoint, self.network, image_shape)

    def losses(self, logits: Array, params: Params, images: Array) -> Array:
        """Returns the loss of the student's `logits` `[b, classes]`, float32 `[b]`.

        The soft loss is T² · KL(teacher at T || student at T), the hard one the cross-entropy with
        the teacher's class.
        """
        frozen = jax.lax.stop_gradient(params[TEACHER])
        target = models.outputs_of(self.network, frozen, images)
        if self.kind == "hard":
            answers = jnp.argmax(target, axis=-1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, answers)
        student, teacher = (jax.nn.log_softmax(x / self.temperature) for x in (logits, target))
        return self.temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(-1)
