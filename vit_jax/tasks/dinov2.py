"""DINOv2: self-distillation of images and patches (Oquab et al. 2023; Zhou et al. 2022, iBOT).

A student sees crops of an image, some of them masked; a teacher, its moving average, sees two large
ones whole. The student's class tokens predict the teacher's on other crops (DINO), its tokens of
masked patches predict the teacher's (iBOT), and KoLeo spreads class tokens over the sphere. An
example has `global` `[2, h, w, channels]` and `local` `[crops, h, w, channels]`; the preprocessing
op `views` makes them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.augment import device_masks
from vit_jax.augment.images import normalize
from vit_jax.augment.masks import BlockRule
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.models.heads.prototypes import PrototypeHead, unit
from vit_jax.models.heads.self_distillation import SelfDistillation
from vit_jax.models.layers.basic import check_choice, pair
from vit_jax.optim import method_schedules
from vit_jax.tasks._base import BaseTask
from vit_jax.tasks._checks import build_backbone, check_data, check_geometry, check_statistics
from vit_jax.tasks._teacher import averaged
from vit_jax.tasks.losses import prototypes, vectors
from vit_jax.tracking.metrics import COUNT, Metric
from vit_jax.types import Array, ArraySpec, Batch, DataInfo, Features, Params

TEACHERS = ("sinkhorn", "centering")


@dataclasses.dataclass(frozen=True)
class Task(BaseTask):
    """The losses of DINOv2.

    Attributes:
      num_prototypes, head_depth, head_hidden, head_bottleneck: see `heads.prototypes`.
      ibot_prototypes, ibot_hidden, ibot_bottleneck: of a head of their own for patches; 0
        prototypes share the head of class tokens.
      teacher: what makes probabilities of the teacher's logits, "sinkhorn" or "centering".
      sinkhorn_iterations: 3 in the paper. center_momentum: of the centers.
      student_temperature: of the student's logits.
      temperature: of the teacher's, at the start and after `temperature_warmup`, a duration.
      momentum: of the teacher's average, at the first step and at the end of the run.
      dino_weight, ibot_weight, koleo_weight: of the three losses.
      mask_share: the share of global crops that have a mask. mask_ratio: the range of their masked
        patches. mask_block: the most patches of one block, as a share of all.
      warmup_steps, num_steps: of the schedules, which training fills in.
    """

    num_prototypes: int = 65536
    head_depth: int = 3
    head_hidden: int = 2048
    head_bottleneck: int = 256
    ibot_prototypes: int = 0
    ibot_hidden: int = 2048
    ibot_bottleneck: int = 256
    teacher: str = "sinkhorn"
    sinkhorn_iterations: int = 3
    center_momentum: float = 0.9
    student_temperature: float = 0.1
    temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: int | str = "30 percent"
    momentum: tuple[float, float] = (0.992, 1.0)
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    mask_share: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_block: float = 0.5
    warmup_steps: int = 0
    num_steps: int = 0

    headline = "feature_distance"
    metric_info: ClassVar[Mapping[str, Metric]] = {
        "feature_distance": Metric(higher_is_better=True),
        "num_examples": COUNT,
    }

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "Task":
        """Returns the task around the backbone of `config.model`.

        Raises:
          UserError: a field has no such value, or the data has no such crops.
        """
        wanted = {name: "uint8 or float32 [crops, h, w, channels]" for name in ("global", "local")}
        views = [info.spec.get(name) for name in wanted]
        fits = all(view is not None and len(view.shape) == 4 for view in views)
        name = cls.__module__.rpartition(".")[2]
        check_data(name, wanted, info, fits and views[0].shape[0] == 2)
        size = views[0].shape[1:]
        backbone = build_backbone(name, model)
        patch = pair(backbone.patch_size)
        if backbone.position == "learned" and not backbone.position_grid:
            grid = (size[0] // patch[0], size[1] // patch[1])
            backbone = backbone.clone(position_grid=grid)
        task = cls(backbone, info, **fields)
        task.check_images()
        task._check()
        return dataclasses.replace(task, model=task._network())

    @property
    def image_spec(self) -> ArraySpec:
        """Returns the shape and the dtype of a global crop, as which images are evaluated."""
        crops = self.info.spec["global"]
        return crops._replace(shape=crops.shape[1:])

    def check_images(self) -> None:
        """Raises a `UserError` where crops do not fit the model or the fields."""
        for name in ("global", "local"):
            shape = self.info.spec[name].shape[1:]
            check_geometry(self.model, shape, self.crop_to_patches)
            check_statistics(self.mean, self.std, shape[-1])

    def _check(self) -> None:
        check_choice("config.task.teacher", self.teacher, TEACHERS)
        if not 0 < self.momentum[0] <= 1 or min(*self.temperature, self.student_temperature) <= 0:
            raise UserError(
                f"config.task.momentum={list(self.momentum)}, temperature={list(self.temperature)}"
                f" and student_temperature={self.student_temperature}: write a first momentum above"
                " 0, to 1, and temperatures above 0"
            )
        if self.model.pooling != "token":
            raise UserError("task dinov2 compares class tokens; write config.model.pooling='token'")
        if not 0 <= self.mask_share <= 1 or not 0 < self.mask_ratio[0] <= self.mask_ratio[1] < 1:
            raise UserError(
                f"config.task.mask_share={self.mask_share} and mask_ratio={list(self.mask_ratio)}:"
                " write shares from 0 to 1, the ratio's lower one first"
            )

    def _network(self) -> SelfDistillation:
        shared = {"depth": self.head_depth, "dtype": self.model.dtype}
        sizes = {"hidden": self.head_hidden, "bottleneck": self.head_bottleneck}
        dino = PrototypeHead(self.num_prototypes, **sizes, **shared)
        if not self.ibot_prototypes:
            return SelfDistillation(self.model, dino)
        sizes = {"hidden": self.ibot_hidden, "bottleneck": self.ibot_bottleneck}
        return SelfDistillation(
            self.model, dino, PrototypeHead(self.ibot_prototypes, **sizes, **shared)
        )

    def with_duration(self, duration: Duration) -> "Task":
        """Returns the task whose schedules end with the run."""
        warmup = duration(self.temperature_warmup, "task.temperature_warmup")
        return dataclasses.replace(self, warmup_steps=warmup, num_steps=duration.total)

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

    # The batch.

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns normalized crops, and `masked`, bool `[batch, 2, patches]`."""
        crops = {
            name: normalize(jnp.asarray(batch[name]), self.mean, self.std)
            for name in ("global", "local")
        }
        share = {"probability": self.mask_share, "ratio": tuple(self.mask_ratio)}
        masks = device_masks.block_masks(key, 2 * len(crops["global"]), self.rule, **share)
        return {**crops, "masked": masks.reshape(2, -1, masks.shape[-1]).swapaxes(0, 1)}

    # The teacher.

    def init_state(self, params: Params, key: Array) -> Params:
        """Returns the teacher, which starts as the student, and the centers, which start at 0."""
        del key
        state = {"teacher": params}
        if self.teacher == "centering":
            state["dino_center"] = jnp.zeros(self.num_prototypes)
            state["ibot_center"] = jnp.zeros(self.ibot_prototypes or self.num_prototypes)
        return state

    def add_targets(self, task_state: Params, batch: Batch, step: Array) -> Batch:
        """Adds the teacher's probabilities, and the centers of the next step.

        `class_targets` are `[batch, 2, prototypes]`, with the crops swapped: crop 1 of the student
        predicts crop 2 of the teacher. `patch_targets` are `[batch, 2, most_masked, prototypes]`.
        """
        found = self._encode(task_state["teacher"], batch["global"])
        numbers, weights = self._buffer(batch["masked"])
        params = {"params": task_state["teacher"]}
        logits = {
            "dino": self.model.apply(params, found.pooled, method="class_logits"),
            "ibot": self.model.apply(params, _taken(found.tokens, numbers), method="patch_logits"),
        }
        counts = {"dino": None, "ibot": weights > 0}
        targets = {
            name: self._probabilities(task_state, name, logits[name], counts[name], step)
            for name in logits
        }
        added = {"class_targets": targets["dino"][:, ::-1], "patch_targets": targets["ibot"]}
        if self.teacher == "centering":
            for name, rows in logits.items():
                old, momentum = task_state[f"{name}_center"], self.center_momentum
                new = prototypes.updated_center(old, rows, counts[name], momentum)
                added[f"{name}_center"] = jnp.broadcast_to(new, (len(numbers), *new.shape))
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

    def next_state(self, task_state: Params, params: Params, batch: Batch, step: Array) -> Params:
        """Returns the teacher, moved towards the student, and the centers with this batch."""
        teacher = averaged(task_state["teacher"], params, self.momentum_at(step))
        centers = {name: batch[name][0] for name in task_state if name != "teacher"}
        return {"teacher": teacher, **centers}

    def momentum_at(self, step: Array | int) -> Array:
        """Returns the momentum of the average at a step, half a cosine."""
        first, last = self.momentum
        return first * method_schedules.dino(step, 0, self.num_steps, end=last / first)

    def temperature_at(self, step: Array | int) -> Array:
        """Returns the teacher's temperature at a step, which rises linearly."""
        first, last = self.temperature
        warmup = self.warmup_steps
        return last * method_schedules.dino(step, warmup, warmup, end=1.0, first=first / last)

    def step_metrics(self, task_state: Params, batch: Batch) -> dict[str, Array]:
        """Returns the entropy of the teacher's class probabilities: their own, and their mean's.

        With a collapse to one prototype both are 0; with one to uniform outputs both are
        log(prototypes).
        """
        del task_state
        p = batch["class_targets"]
        return {
            "teacher_entropy": _entropy(p).mean(),
            "prototype_entropy": _entropy(p.mean((0, 1))),
        }

    # The loss.

    @property
    def needs_whole_batch(self) -> bool:  # type: ignore[override]
        """Returns whether examples are compared with each other, as KoLeo does."""
        return self.koleo_weight > 0

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
        how = {"temperature": self.student_temperature}
        whole = self._encode(params, batch["global"], batch["masked"], keys[0])
        crops = self._encode(params, batch["local"], None, keys[1])
        numbers, weights = self._buffer(batch["masked"])
        variables = {"params": params}

        def class_logits(x: Array) -> Array:
            return self.model.apply(variables, x, method="class_logits").swapaxes(0, 1)

        patches = self.model.apply(variables, _taken(whole.tokens, numbers), method="patch_logits")
        teacher = batch["class_targets"].swapaxes(0, 1)
        terms = 2 + 2 * batch["local"].shape[1]
        same = prototypes.cross_entropies(class_logits(whole.pooled), teacher, **how).sum(0)
        local = prototypes.crop_losses(class_logits(crops.pooled), teacher, **how)
        of_patches = prototypes.cross_entropies(patches, batch["patch_targets"], **how)
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

    def _encode(
        self, params: Params, crops: Array, masked: Array | None = None, key: Array | None = None
    ) -> Features:
        """Encodes crops `[batch, crops, h, w, channels]`; without a key nothing is dropped.

        The result's `pooled` and `tokens` have an axis of crops, too.
        """
        batch, count = crops.shape[:2]
        flat = crops.reshape(-1, *crops.shape[2:])
        masked = None if masked is None else masked.reshape(len(flat), -1)
        how = {} if key is None else {"train": True, "rngs": {"dropout": key}}
        found = self.model.apply({"params": params}, flat, masked, method="encode", **how)
        pooled = found.pooled.astype(jnp.float32).reshape(batch, count, -1)
        tokens = found.tokens.reshape(batch, count, *found.tokens.shape[1:])
        return Features(None, pooled, tokens=tokens)

    def _buffer(self, masked: Array) -> tuple[Array, Array]:
        """Returns the numbers `[batch, 2, most_masked]` of masked patches, and their weights."""
        weights = prototypes.patch_weights(masked)
        numbers = jnp.argsort(~masked, axis=-1, stable=True)[..., : self.most_masked]
        return numbers, jnp.take_along_axis(weights, numbers, axis=-1)

    # In evaluation: are the features of different images different?

    def inputs(self, batch: Batch) -> Array:
        """Returns the images of a batch, or the first global crop of each example."""
        images = batch["image"] if "image" in batch else batch["global"][:, 0]
        return normalize(jnp.asarray(images), self.mean, self.std)

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns `feature`, the class token as a vector of length 1."""
        found = self.model.apply({"params": params}, self.inputs(batch), method="encode")
        return {"feature": unit(found.pooled.astype(jnp.float32))}

    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the sum of the features, and the number of examples."""
        real = batch["mask"] > 0
        features = self.predict(params, batch)["feature"]
        total = jnp.where(real[:, None], features, 0.0).sum(0)
        return {"feature": total, "examples": real.sum(dtype=jnp.int32)}

    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns `feature_distance`, 1 - the mean cosine of two images: 0 after a collapse."""
        count = int(found["examples"])
        cosines = float(np.square(found["feature"]).sum()) - count
        mean = cosines / max(count * (count - 1), 1)
        return {"feature_distance": 1.0 - mean, "num_examples": count}

    def result_lines(self, examples: Mapping[str, np.ndarray], top: int) -> list[list[str]]:
        """Returns the first numbers of each example's feature."""
        return [[", ".join(f"{x:.3f}" for x in row[:4])][:top] for row in examples["feature"]]

    def train_flops(self) -> int:
        """Returns the operations of the backbones for one example; heads are not counted."""
        total = 0
        for name, factor in (("global", 4), ("local", 3)):
            crops, height, width, channels = self.info.spec[name].shape
            whole = models.flops(self.model.backbone, (height, width), channels)
            total += factor * crops * whole
        return total


def _taken(tokens: Array, numbers: Array) -> Array:
    """Returns the named patches `[b, crops, n, width]` of tokens `[b, crops, patches, width]`."""
    return jnp.take_along_axis(tokens, numbers[..., None], axis=2)


def _entropy(p: Array) -> Array:
    return -(p * jnp.log(jnp.maximum(p, 1e-20))).sum(-1)
