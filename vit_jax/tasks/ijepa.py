"""I-JEPA: prediction of a teacher's tokens from a part of the image (Assran et al. 2023).

The student encodes a context; a predictor tells from it the tokens that the teacher, which is the
student's moving average and sees the whole image, has at target blocks. An example needs an `image`
alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.augment import device_masks
from vit_jax.augment.masks import MultiBlockRule
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.models.heads.context_predictor import ContextPredictor
from vit_jax.models.layers.basic import pair
from vit_jax.tasks._checks import build_backbone, check_positive, check_ranges, check_share
from vit_jax.tasks._mean_error import MeanErrorTask
from vit_jax.tasks._teacher import averaged
from vit_jax.tasks.losses.vectors import smooth_l1
from vit_jax.tracking.metrics import COUNT, LOSS, Metric
from vit_jax.types import Array, Batch, DataInfo, Features, HostBatch, Params

_TARGET_EPSILON = 1e-5
_COLLAPSED = 0.01
"""The deviation of the teacher's tokens in a collapse, at most; their own deviation is 1."""


@dataclasses.dataclass(frozen=True)
class Task(MeanErrorTask):
    """The smooth L1 distance of predicted tokens from the teacher's normalized ones.

    Attributes:
      predictor_width, predictor_depth, predictor_heads, predictor_mlp_dim: the size of the
        predictor; 0 heads are those of the backbone, and 0 for the MLP is four times the width.
      num_targets, num_contexts, target_scale, context_scale, target_aspect, min_keep, overlap: see
        `augment.masks.MultiBlockRule`.
      context_patches: the most patches of a context that are encoded, which sets the cost of a
        step; longer contexts are cut. 0 is as many as a context may have.
      mask_groups: the number of equal parts of a batch in which all contexts have the length of the
        shortest one. Codebases that train on each device on its own have one for each device.
      momentum: of the teacher's average, from the first step to the end of the schedule.
      stretch: the momentum follows a run this many times as long.
      num_steps: the length of the run, which training fills in.
    """

    predictor_width: int = 384
    predictor_depth: int = 12
    predictor_heads: int = 0
    predictor_mlp_dim: int = 0
    num_targets: int = MultiBlockRule.num_targets
    num_contexts: int = MultiBlockRule.num_contexts
    target_scale: tuple[float, float] = MultiBlockRule.target_scale
    context_scale: tuple[float, float] = MultiBlockRule.context_scale
    target_aspect: tuple[float, float] = MultiBlockRule.target_aspect
    min_keep: int = MultiBlockRule.min_keep
    overlap: bool = MultiBlockRule.overlap
    context_patches: int = 0
    mask_groups: int = 1
    momentum: tuple[float, float] = (0.996, 1.0)
    stretch: float = 1.0
    num_steps: int = 0

    filled_in: ClassVar[tuple[str, ...]] = ("num_steps",)
    headline = "prediction_loss"
    metric_info: ClassVar[Mapping[str, Metric]] = {"prediction_loss": LOSS, "num_examples": COUNT}

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "Task":
        """Returns the task around the backbone of `config.model`.

        Raises:
          UserError: a field has no such value, or the data has no such images.
        """
        backbone = build_backbone("ijepa", model)
        task = cls(backbone, info, **fields)
        task.check_images()
        others = ("class_token", "distill_token", "num_registers")
        if (
            not backbone.position.startswith("sincos2d")
            or backbone.pooling not in ("mean", "none")
            or any(getattr(backbone, name) for name in others)
        ):
            raise UserError(
                "task ijepa encodes patches alone, with fixed positions; write model.pooling='mean'"
                " and model.position='sincos2d_mae', and no class token or registers"
            )
        task._check_fields()
        rule, places = task.rule, np.linspace(0.0, 1.0, 101)
        sizes = [size(u) for size in (rule.target_size, rule.context_size) for u in places]
        if min(rows * columns for rows, columns in sizes) <= task.min_keep:
            raise UserError(
                f"config.task.min_keep={task.min_keep}: some blocks have no more patches than"
                f" that, {rule.rows}x{rule.columns} patches in all; write less, or larger scales"
            )
        predictor = ContextPredictor(
            backbone,
            width=task.predictor_width,
            depth=task.predictor_depth,
            num_heads=task.predictor_heads or backbone.num_heads,
            mlp_dim=task.predictor_mlp_dim or None,
        )
        return dataclasses.replace(task, model=predictor)

    def _check_fields(self) -> None:
        names = ("predictor_width", "predictor_depth", "num_targets", "num_contexts",
                 "mask_groups")  # fmt: skip
        check_positive(**{name: getattr(self, name) for name in names})
        check_ranges(1.0, target_scale=self.target_scale, context_scale=self.context_scale)
        check_ranges(math.inf, target_aspect=self.target_aspect)
        for share in self.momentum:
            check_share(momentum=share)
        patches = self.rule.rows * self.rule.columns
        if self.context_patches > patches:
            raise UserError(
                f"config.task.context_patches={self.context_patches}: an image has {patches}"
                f" patches; write 0 to {patches}"
            )
        if self.stretch < 1:
            raise UserError(f"config.task.stretch={self.stretch:g}: write 1 or more")

    @property
    def rule(self) -> MultiBlockRule:
        """Returns the rule of contexts and targets."""
        patch = pair(models.backbone_of(self.model).patch_size)
        size = self.image_spec.shape
        names = ("num_targets", "num_contexts", "min_keep", "overlap")
        scales = ("target_scale", "context_scale", "target_aspect")
        fields = {name: getattr(self, name) for name in names}
        fields |= {name: tuple(getattr(self, name)) for name in scales}
        return MultiBlockRule(size[0] // patch[0], size[1] // patch[1], **fields)

    def with_duration(self, duration: Duration) -> "Task":
        """Returns the task whose momentum ends with the run, or `stretch` times as late."""
        return dataclasses.replace(self, num_steps=duration.total)

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns normalized images, and the patches of contexts and targets.

        `context` and `targets` are int32 `[batch, blocks, n]`; `context_counts` and
        `target_counts`, bool, tell patches from padding.
        """
        image_key, mask_key = jax.random.split(key)
        batch = super().augment({"image": batch["image"]}, image_key)
        return {
            "image": batch["image"],
            **self._masks(mask_key, len(batch["image"]), self.mask_groups),
        }

    def hidden(self, batch: HostBatch) -> dict[str, np.ndarray]:
        """Returns the patches of `image` that are in no context."""
        numbers, counts = (np.asarray(batch[name]) for name in ("context", "context_counts"))
        hidden = np.ones((len(numbers), self.rule.rows * self.rule.columns), bool)
        for row, (places, real) in enumerate(zip(numbers, counts, strict=True)):
            hidden[row, places[real]] = False
        return {"image": hidden.reshape(-1, self.rule.rows, self.rule.columns)}

    def _masks(self, key: Array, batch: int, groups: int = 1) -> dict[str, Array]:
        size = self.context_patches or device_masks.most_context_patches(self.rule)
        if batch % groups:
            raise UserError(
                f"config.task.mask_groups={groups} does not divide the batch of {batch}"
            )
        context, targets = device_masks.multi_block_masks(key, batch, self.rule, size, groups)
        return {
            "context": context.numbers,
            "context_counts": context.counts,
            "targets": targets.numbers,
            "target_counts": targets.counts,
        }

    # The teacher.

    def init_state(self, params: Params, key: Array) -> Params:
        """Returns the teacher, which starts as the student."""
        del key
        return {"teacher": params}

    def add_targets(self, task_state: Params, batch: Batch, step: Array) -> Batch:
        """Adds `tokens`, the teacher's normalized tokens of whole images, `[batch, n, width]`."""
        del step
        return {**batch, "tokens": self._tokens(task_state["teacher"], batch["image"])}

    def _tokens(self, params: Params, images: Array) -> Array:
        """Returns tokens float32 with mean 0 and variance 1 each."""
        found: Features = self.model.backbone.apply({"params": params["backbone"]}, images)
        assert found.tokens is not None
        x = found.tokens.astype(jnp.float32)
        x -= x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + _TARGET_EPSILON)

    def next_state(self, task_state: Params, params: Params, batch: Batch, step: Array) -> Params:
        """Returns the teacher, moved towards the student."""
        del batch
        return {"teacher": averaged(task_state["teacher"], params, self.momentum_at(step))}

    def momentum_at(self, step: Array) -> Array:
        """Returns the momentum of the average at a step, which rises linearly."""
        first, last = self.momentum
        steps = max(self.num_steps * self.stretch, 1)
        return first + jnp.asarray(step).astype(jnp.result_type(float)) * (last - first) / steps

    def step_metrics(self, task_state: Params, batch: Batch) -> dict[str, Array]:
        """Returns the deviation of the teacher's tokens from each other, 0 after a collapse."""
        del task_state
        return {"teacher_std": batch["tokens"].std((0, 1)).mean()}

    def warnings(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Returns a line if the teacher's tokens have become equal."""
        del step
        collapsed = metrics["teacher_std"] <= _COLLAPSED
        line = "collapse: the teacher's tokens are all alike (train/teacher_std is near 0)"
        return [line] if collapsed else []

    # The loss.

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the losses of target patches, their number) of a micro-batch."""
        losses, counts = self._losses(params, batch, train=True, rngs={"dropout": key})
        return losses.sum(), counts.sum(dtype=jnp.float32)

    def _losses(self, params: Params, batch: Batch, **how: Any) -> tuple[Array, Array]:
        """Returns the loss of each target patch, and whether it counts: `[batch, t, c, m]`."""
        context = batch["context"], batch["context_counts"]
        targets = batch["targets"], batch["target_counts"]
        said = models.outputs_of(self.model, params, batch["image"], context, targets, **how)
        wanted = jax.vmap(lambda tokens, numbers: tokens[numbers])(batch["tokens"], targets[0])
        losses = smooth_l1(said - wanted[:, :, None]).mean(-1)
        counts = jnp.broadcast_to(targets[1][:, :, None], losses.shape)
        return jnp.where(counts, losses, 0.0), counts

    # Evaluation has the same masks for every image, and the teacher teaches itself.

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns `error`, the mean loss of each example's target patches."""
        images = self.inputs(batch)
        own = {"image": images, "tokens": self._tokens(params, images)}
        masks = self._masks(jax.random.key(0), 1)
        own |= {name: x.repeat(len(images), axis=0) for name, x in masks.items()}
        losses, counts = self._losses(params, own)
        return {"error": losses.sum((1, 2, 3)) / jnp.maximum(counts.sum((1, 2, 3)), 1)}

    def train_flops(self) -> int:
        """Returns the operations for one image: teacher, contexts and predictor.

        The teacher has no backward pass. Contexts count with the size of their buffer.
        """
        height, width, channels = self.image_spec.shape
        whole = models.flops(self.model.backbone, (height, width), channels)
        size = self.context_patches or device_masks.most_context_patches(self.rule)
        share = size / (self.rule.rows * self.rule.columns)
        target = device_masks.most_target_patches(self.rule)
        predictor = 2 * self.predictor_depth * (size + target) * self.num_targets
        predictor *= 12 * self.predictor_width**2
        return int(whole + 3 * self.num_contexts * (share * whole + predictor))
