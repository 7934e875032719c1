"""DINOv2: self-distillation of images and patches (Oquab et al. 2023; Zhou et al. 2022, iBOT).

Some crops of the student are masked. Its class tokens predict the teacher's on other crops (DINO),
its tokens of masked patches predict the teacher's (iBOT), and KoLeo spreads class tokens over the
sphere. See `_self_distillation` for the crops.

DINOv3 (Siméoni et al. 2025) adds two options: Gram anchoring (`gram_weight`), and distillation of a
frozen teacher into one or more students (`distill`, `students`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.augment import device_masks
from vit_jax.augment.masks import BlockRule
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.models.heads.self_distillation import SelfDistillation
from vit_jax.models.layers.basic import check_choice, pair
from vit_jax.models.published import TEACHER
from vit_jax.optim.groups import STUDENTS
from vit_jax.tasks._checks import check_not_negative, check_positive
from vit_jax.tasks._self_distillation import VIEWS, SelfDistillationTask
from vit_jax.tasks._students import FrozenTeacher, backbone_like, own_params
from vit_jax.tasks._teacher import averaged
from vit_jax.tasks.losses import gram, prototypes, vectors
from vit_jax.types import Array, Batch, Features, HostBatch, Params

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
      gram_weight: the weight of Gram anchoring, see `losses.gram`; 0 = off, DINOv3 has 2.
      gram_from, gram_every: durations. The Gram teacher is the teacher of step `gram_from`, from
        which the loss counts, and is replaced by the current teacher every `gram_every`; 0 keeps
        it. A run that starts from a checkpoint with `gram_from` 0 is anchored to the checkpoint.
      gram_scale: the global crops of the data are so many times as large as those that teacher and
        student see. The Gram teacher sees them as they are, and its tokens are resized; DINOv3
        has 2.
      distill: a frozen teacher in the place of the average: the keys of
        `tasks._students.FrozenTeacher`. The averages of the students are still what is published.
      students: the `config.model` of further students by name, which learn from the same teacher,
        crops and masks in the same step. `config.model` is the first student.
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
    gram_weight: float = 0.0
    gram_from: int | str = 0
    gram_every: int | str = 0
    gram_scale: int = 1
    distill: Mapping[str, Any] | None = None
    students: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    gram_start: int = 0
    gram_period: int = 0

    hides_patches: ClassVar[bool] = True

    filled_in: ClassVar[tuple[str, ...]] = (
        *SelfDistillationTask.filled_in,
        "gram_start",
        "gram_period",
    )

    def check_fields(self) -> None:
        """Raises a `UserError` where a field has no such value."""
        super().check_fields()
        check_choice("config.task.teacher", self.teacher, TEACHERS)
        check_positive(mask_block=self.mask_block)
        weights = ("dino_weight", "ibot_weight", "koleo_weight", "gram_weight")
        check_not_negative(**{name: getattr(self, name) for name in weights})
        if not 0 <= self.mask_share <= 1 or not 0 < self.mask_ratio[0] <= self.mask_ratio[1] < 1:
            raise UserError(
                f"config.task.mask_share={self.mask_share} and mask_ratio={list(self.mask_ratio)}:"
                " write shares from 0 to 1, the ratio's lower one first"
            )
        self._check_gram()
        if self.students and not self.distill:
            raise UserError("config.task.students learn from a frozen teacher; write distill too")
        _ = self.frozen_teacher, self.other_students  # Raises their errors early.

    def _check_gram(self) -> None:
        check_positive(gram_scale=self.gram_scale)
        height, width = self.info.spec["global"].shape[1:3]
        unread = {"gram_scale": self.gram_scale > 1} | {
            name: getattr(self, name) not in (0, "") for name in ("gram_from", "gram_every")
        }
        if not self.gram_weight and any(unread.values()):
            name = next(name for name, is_set in unread.items() if is_set)
            raise UserError(f"config.task.{name} is for Gram anchoring; write gram_weight too")
        if height % self.gram_scale or width % self.gram_scale:
            raise UserError(
                f"config.task.gram_scale={self.gram_scale} does not divide the global crops of"
                f" {height}×{width} pixels"
            )
        if self.gram_weight and self.distill:
            raise UserError(
                "config.task.gram_weight: the Gram teacher is an earlier teacher, and that of"
                " distill never changes; leave one out"
            )

    def crop_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a crop as the student sees it; see `gram_scale`."""
        height, width, channels = super().crop_shape(name)
        scale = max(1, self.gram_scale) if name == "global" else 1
        return height // scale, width // scale, channels

    def network(self) -> SelfDistillation:
        """Returns the backbone with one head for both losses, or one for each."""
        backbone = self.model
        dino = self.head(self.num_prototypes, self.head_hidden, self.head_bottleneck)
        if not self.ibot_prototypes:
            return SelfDistillation(backbone, dino)
        ibot = self.head(self.ibot_prototypes, self.ibot_hidden, self.ibot_bottleneck)
        return SelfDistillation(backbone, dino, ibot)

    def _around(
        self, where: str, model: Mapping[str, Any], crops: Sequence[tuple[int, ...]], **fields: Any
    ) -> "Task":
        """Returns this task around another backbone, which sees crops of these shapes, alone."""
        like = models.backbone_of(self.model)
        backbone = backbone_like(where, model, like, crops)
        fields = {"model": backbone, "distill": None, "students": {}, **fields}
        alone = dataclasses.replace(self, **fields)
        return dataclasses.replace(alone, model=alone.network())

    @functools.cached_property
    def frozen_teacher(self) -> "tuple[FrozenTeacher, Task] | None":
        """Returns the frozen teacher of `distill`, and the task around its network."""
        if not self.distill:
            return None
        teacher = FrozenTeacher.create(self.distill)
        crops = self.seen_shapes()[:1]  # A frozen teacher sees global crops alone.
        return teacher, self._around("distill.model", teacher.model, crops, **teacher.sizes())

    @functools.cached_property
    def other_students(self) -> "dict[str, Task]":
        """Returns the task around each further student, by name."""
        crops, items = self.seen_shapes(), self.students.items()
        return {name: self._around(f"{STUDENTS}.{name}", model, crops) for name, model in items}

    def with_duration(self, duration: Duration) -> "Task":
        """Returns the task whose schedules end with the run."""
        return dataclasses.replace(
            super().with_duration(duration),
            gram_start=duration(self.gram_from, "task.gram_from"),
            gram_period=duration(self.gram_every, "task.gram_every"),
        )

    @property
    def rule(self) -> BlockRule:
        """Returns the rule of the masks."""
        patch = pair(models.backbone_of(self.model).patch_size)
        height, width = self.image_spec.shape[:2]
        # DINOv2's own code rounds in this order, which counts where a side has an odd number.
        most = self.mask_block * height // patch[0] * width // patch[1]
        return BlockRule(height // patch[0], width // patch[1], most)

    @property
    def most_masked(self) -> int:
        """Returns the most masked patches of a crop, the size of the buffer of each one's."""
        return int(self.rule.rows * self.rule.columns * self.mask_ratio[1])

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns normalized crops, and `masked`, bool `[batch, 2, patches]`.

        Where `gram_scale` is above 1, `gram` are the global crops in their full size.
        """
        crops = super().augment(batch, key)
        if self.gram_scale > 1:
            large = crops["global"]
            shape = (*large.shape[:2], *self.crop_shape("global"))
            small = jax.image.resize(large, shape, "cubic", antialias=True)
            crops = {**crops, "global": small, "gram": large}
        count, (least, most) = 2 * len(crops["global"]), self.mask_ratio
        masks = device_masks.block_masks(
            key, count, self.rule, probability=self.mask_share, ratio=(least, most)
        )
        return {**crops, "masked": masks.reshape(2, -1, masks.shape[-1]).swapaxes(0, 1)}

    def hidden(self, batch: HostBatch) -> dict[str, np.ndarray]:
        """Returns the patches of `global` crops that are masked for the student."""
        masked, rule = np.asarray(batch["masked"]), self.rule
        return {"global": masked.reshape(*masked.shape[:2], rule.rows, rule.columns)}

    # The parameters.

    def init(self, key: Array) -> Params:
        """Returns fresh parameters, with those of further students and of a frozen teacher."""
        params = dict(super().init(key))
        if self.students:
            params[STUDENTS] = {
                name: task.init(jax.random.fold_in(key, i))
                for i, (name, task) in enumerate(sorted(self.other_students.items()), start=1)
            }
        if self.frozen_teacher:
            params[TEACHER] = self.frozen_teacher[1].init(key)
        return params

    def loaded_params(self) -> Params:
        """Returns the parameters of a frozen teacher."""
        if not self.frozen_teacher:
            return {}
        teacher, task = self.frozen_teacher
        return {TEACHER: teacher.load(task.model, self.image_spec.shape)}

    def frozen(self, params: Params, patterns: Sequence[str]) -> list[str]:
        """Returns `patterns`, and the parameters of a frozen teacher."""
        return [*patterns, f"{TEACHER}/.*"] if self.distill else list(patterns)

    def inference_params(self, params: Params) -> Params:
        """Returns the parameters of the first student alone."""
        return own_params(params)

    # The teacher.

    def init_state(self, params: Params, key: Array) -> dict[str, Any]:
        """Returns the teacher, which starts as the student, and the centers, which start at 0.

        The averages of further students are below `students`, and the backbone of the Gram teacher
        is in `gram`.
        """
        state = super().init_state(own_params(params), key)
        if self.students:
            state[STUDENTS] = params[STUDENTS]
        if self.gram_weight:
            state["gram"] = {"backbone": params["backbone"]}
        if self.teacher == "centering":
            state["dino_center"] = jnp.zeros(self.num_prototypes)
            state["ibot_center"] = jnp.zeros(self.ibot_prototypes or self.num_prototypes)
        return state

    def add_targets(self, task_state: Params, batch: Batch, step: Array) -> Batch:
        """Adds the teacher's probabilities, and with centers the logits that they are made of.

        `class_targets` are `[batch, 2, prototypes]`, with the crops swapped: crop 1 of the student
        predicts crop 2 of the teacher. `patch_targets` are `[batch, 2, most_masked, prototypes]`.
        With Gram anchoring, `gram_tokens` are `[batch, 2, patches, width]`, and `gram_counts`
        tells whether the loss counts yet.
        """
        batch = self._add_targets_of(task_state[TEACHER], task_state, batch, step)
        if not self.gram_weight:
            return batch
        counts = jnp.broadcast_to(step >= self.gram_start, len(batch["global"]))
        tokens = self._gram_tokens(task_state["gram"], batch)
        return {**batch, "gram_tokens": tokens, "gram_counts": counts.astype(jnp.float32)}

    def add_targets_from(
        self, params: Params, task_state: Params, batch: Batch, step: Array
    ) -> Batch:
        """Does as `add_targets`, with the frozen teacher among the parameters if there is one."""
        if not self.frozen_teacher:
            return self.add_targets(task_state, batch, step)
        task = self.frozen_teacher[1]
        return task._add_targets_of(params[TEACHER], task_state, batch, step)

    def _gram_tokens(self, params: Params, batch: Batch) -> Array:
        """Returns the Gram teacher's tokens of global crops, on the grid of the student's."""
        crops = batch.get("gram", batch["global"])
        flat = crops.reshape(-1, *crops.shape[2:])
        found: Features = self.model.backbone.apply({"params": params["backbone"]}, flat)
        assert found.tokens is not None
        tokens = found.tokens.reshape(*crops.shape[:2], *found.tokens.shape[1:])
        if self.gram_scale == 1:
            return tokens
        patch = pair(models.backbone_of(self.model).patch_size)
        old = tuple(n // p for n, p in zip(crops.shape[2:4], patch, strict=True))
        return gram.resized_tokens(tokens, old, (self.rule.rows, self.rule.columns))

    def _add_targets_of(
        self, teacher: Params, task_state: Params, batch: Batch, step: Array
    ) -> Batch:
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
        state = super().next_state(task_state, own_params(params), batch, step)
        if self.students:
            momentum = self.momentum_at(step)
            state[STUDENTS] = averaged(task_state[STUDENTS], params[STUDENTS], momentum)
        if self.gram_weight:
            take = functools.partial(jax.lax.select, self._renews_gram(step))
            today = {"backbone": state[TEACHER]["backbone"]}
            state["gram"] = jax.tree.map(take, today, task_state["gram"])
        if self.teacher == "centering":
            counts = {"dino": None, "ibot": self._buffer(batch["masked"])[1] > 0}
            for name, rows in counts.items():
                center, logits = task_state[f"{name}_center"], batch[f"{name}_logits"]
                new = prototypes.updated_center(center, logits, rows, self.center_momentum)
                state[f"{name}_center"] = new
        return state

    def _renews_gram(self, step: Array) -> Array:
        """Returns whether the teacher after a step becomes the Gram teacher.

        Until the loss counts it always does: the start may move when the run is resumed.
        """
        since = step + 1 - self.gram_start
        if not self.gram_period:
            return since <= 0
        return (since <= 0) | (since % self.gram_period == 0)

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
        each = self._each_student(params)
        totals = [self._weighted(task.losses(own, batch, key)) for task, own in each]
        whole = functools.reduce(jnp.add, totals)
        return whole.sum(), jnp.float32(len(whole))

    def _weighted(self, losses: Mapping[str, Array]) -> Array:
        dino = self.dino_weight * (losses["local"] + losses["global"])
        whole = dino + self.koleo_weight * losses["koleo"] + self.ibot_weight * losses["ibot"]
        return whole + self.gram_weight * losses["gram"] if self.gram_weight else whole

    def _each_student(self, params: Params) -> Iterator[tuple["Task", Params]]:
        """Yields the task around each student with its parameters, the first student first."""
        yield self, own_params(params)
        for name, task in self.other_students.items():
            yield task, params[STUDENTS][name]

    def losses(self, params: Params, batch: Batch, key: Array) -> dict[str, Array]:
        """Returns the losses of each example: `local`, `global`, `ibot` and `koleo`, `[batch]`.

        With Gram anchoring there is `gram` too.
        """
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
        if self.gram_weight:
            anchored = gram.gram_losses(whole.tokens, batch["gram_tokens"]).mean(1)
            losses["gram"] = batch["gram_counts"] * anchored
        return losses

    def train_flops(self) -> int:
        """Returns the operations of the backbones for one example; heads are not counted."""
        tasks = [task.model.backbone for task in (self, *self.other_students.values())]
        total = sum(self.crop_flops(backbone, name, 3) for backbone in tasks for name in VIEWS)
        teacher = self.frozen_teacher[1] if self.frozen_teacher else self
        total += self.crop_flops(teacher.model.backbone, "global", 1)
        if self.gram_weight:
            crops, height, width, channels = self.info.spec["global"].shape
            total += crops * models.flops(self.model.backbone, (height, width), channels)
        return total

    def _buffer(self, masked: Array) -> tuple[Array, Array]:
        """Returns the numbers `[batch, 2, most_masked]` of masked patches, and their weights."""
        weights = prototypes.patch_weights(masked)
        numbers = jnp.argsort(~masked, axis=-1, stable=True)[..., : self.most_masked]
        return numbers, jnp.take_along_axis(weights, numbers, axis=-1)


def _taken(tokens: Array, numbers: Array) -> Array:
    """Returns the named patches `[b, crops, n, width]` of tokens `[b, crops, patches, width]`."""
    return jnp.take_along_axis(tokens, numbers[..., None], axis=2)
