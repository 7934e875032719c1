"""DINOv2: self-distillation of images and patches (Oquab et al. 2023; Zhou et al. 2022, iBOT).

Some crops of the student are masked. Its class tokens predict the teacher's on other crops (DINO),
its tokens of masked patches predict the teacher's (iBOT), and KoLeo spreads class tokens over the
sphere. See `_self_distillation` for the crops.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax import models
from vit_jax.augment import device_masks
from vit_jax.augment.masks import BlockRule
from vit_jax.errors import UserError
from vit_jax.models.heads.self_distillation import SelfDistillation
from vit_jax.models.layers.basic import check_choice, pair
from vit_jax.tasks._checks import check_not_negative, check_positive
from vit_jax.tasks._self_distillation import SelfDistillationTask
from vit_jax.tasks.losses import prototypes, vectors
from vit_jax.types import Array, Batch, Params

TEACHERS = ("sinkhorn", "centering")


@dataclasses.dataclass(frozen=True)
class Task(SelfDistillationTask):
    """The losses of DINOv2.

    Attributes (see `SelfDistillationTask` for others):
      ibot_prototypes, ibot_hidden, ibot_bottleneck: the sizes of a head of their own for patches;
        0 prototypes share the head of class tokens.
      teacher: what makes probabilities of the teacher's logits, "sinkhorn" or "centering".
      sinkhorn_iterations: 3 in the paper.
      dino_weight, ibot_weight, koleo_weight: the weights of the three losses.
      mask_share: the share of global crops that have a mask. mask_ratio: the range of their masked
        patches. mask_block: the most patches of one block, as a share of all.
    """

    temperature_warmup: int | str = "30 percent"
    momentum: tuple[float, float] = (0.992, 1.0)
    ibot_prototypes: int = 0
    ibot_hidden: int = 2048
    ibot_bottleneck: int = 256
    teacher: str = "sinkhorn"
    sinkhorn_iterations: int = 3
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    mask_share: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_block: float = 0.5

    def check_fields(self) -> None:
        """Raises a `UserError` where a field has no such value."""
        super().check_fields()
        check_choice("config.task.teacher", self.teacher, TEACHERS)
        check_positive(mask_block=self.mask_block)
        weights = ("dino_weight", "ibot_weight", "koleo_weight")
        check_not_negative(**{name: getattr(self, name) for name in weights})
        if not 0 <= self.mask_share <= 1 or not 0 < self.mask_ratio[0] <= self.mask_ratio[1] < 1:
            raise UserError(
                f"config.task.mask_share={self.mask_share} and mask_ratio={list(self.mask_ratio)}:"
                " write shares from 0 to 1, the ratio's lower one first"
            )

    def network(self) -> SelfDistillation:
        """Returns the backbone with one head for both losses, or one for each."""
        dino = self.head(self.num_prototypes, self.head_hidden, self.head_bottleneck)
        if not self.ibot_prototypes:
            return SelfDistillation(self.model, dino)
        ibot = self.head(self.ibot_prototypes, self.ibot_hidden, self.ibot_bottleneck)
        return SelfDistillation(self.model, dino, ibot)

    @property
    def rule(self) -> BlockRule:
        """Returns the rule of the masks."""
        patch = pair(models.backbone_of(self.model).patch_size)
        height, width = self.image_spec.shape[:2]
        rows, columns = height // patch[0], width // patch[1]
        return BlockRule(rows, columns, self.mask_block * rows * columns)

    @property
    def most_masked(self) -> int:
        """Returns the most masked patches of a crop, the size of the buffer of each one's."""
        return int(self.rule.rows * self.rule.columns * self.mask_ratio[1])

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns normalized crops, and `masked`, bool `[batch, 2, patches]`."""
        crops = super().augment(batch, key)
        least, most = self.mask_ratio
        masks = device_masks.block_masks(
            key,
            2 * len(crops["global"]),
            self.rule,
            probability=self.mask_share,
            ratio=(least, most),
        )
        return {**crops, "masked": masks.reshape(2, -1, masks.shape[-1]).swapaxes(0, 1)}

    # The teacher.

    def init_state(self, params: Params, key: Array) -> dict[str, Any]:
        """Returns the teacher, which starts as the student, and the centers, which start at 0."""
        state = super().init_state(params, key)
        if self.teacher == "centering":
            state["dino_center"] = jnp.zeros(self.num_prototypes)
            state["ibot_center"] = jnp.zeros(self.ibot_prototypes or self.num_prototypes)
        return state

    def add_targets(self, task_state: Params, batch: Batch, step: Array) -> Batch:
        """Adds the teacher's probabilities, and with centers the logits that they are made of.

        `class_targets` are `[batch, 2, prototypes]`, with the crops swapped: crop 1 of the student
        predicts crop 2 of the teacher. `patch_targets` are `[batch, 2, most_masked, prototypes]`.
        """
        teacher = task_state["teacher"]
        found = self.encode(teacher, batch["global"])
        numbers, weights = self._buffer(batch["masked"])
        patches = _taken(found.tokens, numbers)
        logits = {
            "dino": self.class_logits(teacher, found.pooled),
            "ibot": models.outputs_of(self.model, teacher, patches, method="patch_logits"),
        }
        counts = {"dino": None, "ibot": weights > 0}
        targets = {
            name: self._probabilities(task_state, name, logits[name], counts[name], step)
            for name in logits
        }
        added = {"class_targets": targets["dino"][:, ::-1], "patch_targets": targets["ibot"]}
        if self.teacher == "centering":
            added |= {f"{name}_logits": rows for name, rows in logits.items()}
        return {**batch, **added}

    def _probabilities(
        self, task_state: Params, name: str, logits: Array, counts: Array | None, step: Array
    ) -> Array:
        temperature = self.temperature_at(step).astype(jnp.float32)
        if self.teacher == "centering":
            center = task_state[f"{name}_center"]
            return prototypes.centered_probabilities(logits, center, temperature)
        rows = logits.reshape(-1, logits.shape[-1])
        counts = None if counts is None else counts.reshape(-1)
        found = prototypes.sinkhorn_probabilities(
            rows, temperature, counts, self.sinkhorn_iterations
        )
        return found.reshape(logits.shape)

    def next_state(
        self, task_state: Params, params: Params, batch: Batch, step: Array
    ) -> dict[str, Any]:
        """Returns the teacher, moved towards the student, and the centers with this batch."""
        state = super().next_state(task_state, params, batch, step)
        if self.teacher == "centering":
            counts = {"dino": None, "ibot": self._buffer(batch["masked"])[1] > 0}
            for name, rows in counts.items():
                center, logits = task_state[f"{name}_center"], batch[f"{name}_logits"]
                new = prototypes.updated_center(center, logits, rows, self.center_momentum)
                state[f"{name}_center"] = new
        return state

    # The loss.

    def check_accumulation(self) -> None:
        """Raises a `UserError` with KoLeo, which looks for neighbors in the whole batch."""
        if self.koleo_weight:
            raise UserError(
                "config.task.koleo_weight: KoLeo compares all examples of a batch; write 0, or"
                " accum_steps=1"
            )

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the examples' losses, their number) of a micro-batch."""
        losses = self.losses(params, batch, key)
        dino = self.dino_weight * (losses["local"] + losses["global"])
        whole = dino + self.koleo_weight * losses["koleo"] + self.ibot_weight * losses["ibot"]
        return whole.sum(), jnp.float32(len(whole))

    def losses(self, params: Params, batch: Batch, key: Array) -> dict[str, Array]:
        """Returns the losses of each example: `local`, `global`, `ibot` and `koleo`, `[batch]`."""
        keys = jax.random.split(key)
        temperature = self.student_temperature
        whole = self.encode(params, batch["global"], batch["masked"], keys[0])
        crops = self.encode(params, batch["local"], None, keys[1])
        numbers, weights = self._buffer(batch["masked"])
        taken = _taken(whole.tokens, numbers)
        patches = models.outputs_of(self.model, params, taken, method="patch_logits")
        teacher = batch["class_targets"].swapaxes(0, 1)
        terms = 2 + 2 * batch["local"].shape[1]
        large, small = (
            self.class_logits(params, found.pooled).swapaxes(0, 1) for found in (whole, crops)
        )
        same = prototypes.cross_entropies(large, teacher, temperature=temperature).sum(0)
        local = prototypes.crop_losses(small, teacher, temperature=temperature)
        of_patches = prototypes.cross_entropies(
            patches, batch["patch_targets"], temperature=temperature
        )
        losses = {
            "local": local / terms,
            "global": same / terms,
            "ibot": (of_patches * weights).sum((1, 2)) / 2,
            "koleo": jnp.zeros(len(local)),
        }
        if self.koleo_weight:
            each = [vectors.koleo_losses(whole.pooled[:, i]) for i in range(2)]
            losses["koleo"] = each[0] + each[1]
        return losses

    def _buffer(self, masked: Array) -> tuple[Array, Array]:
        """Returns the numbers `[batch, 2, most_masked]` of masked patches, and their weights."""
        weights = prototypes.patch_weights(masked)
        numbers = jnp.argsort(~masked, axis=-1, stable=True)[..., : self.most_masked]
        return numbers, jnp.take_along_axis(weights, numbers, axis=-1)


def _taken(tokens: Array, numbers: Array) -> Array:
    """Returns the named patches `[b, crops, n, width]` of tokens `[b, crops, patches, width]`."""
    return jnp.take_along_axis(tokens, numbers[..., None], axis=2)
