"""The base of DINO and DINOv2: crops of two kinds, a teacher that is an average, and evaluation.

A student sees crops of an image; a teacher, its moving average, sees the two large ones whole. An
example has `global` `[2, h, w, channels]` and `local` `[crops, h, w, channels]`; the preprocessing
op `views` makes them.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.augment.images import normalize
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.models.heads.prototypes import PrototypeHead, unit
from vit_jax.models.heads.self_distillation import SelfDistillation
from vit_jax.optim import method_schedules
from vit_jax.tasks._base import BaseTask
from vit_jax.tasks._checks import (
    build_backbone,
    check_data,
    check_geometry,
    check_positive,
    check_share,
    check_statistics,
)
from vit_jax.tasks._students import with_position_grid
from vit_jax.tasks._teacher import averaged
from vit_jax.tracking.metrics import COUNT, Metric
from vit_jax.types import Array, ArraySpec, Batch, DataInfo, HostBatch, Params

VIEWS = ("global", "local")
_QUIET_SHARE = 0.05
"""The share of the run, at its start, in which no collapse is warned of."""
_COLLAPSED = 0.01
"""The mutual information of a collapse, at most, as a share of the largest entropy."""


class Encoded(NamedTuple):
    """The output of the backbone for crops.

    Attributes:
      pooled: the class tokens, float32 `[batch, crops, width]`.
      tokens: the tokens of patches, `[batch, crops, patches, width]`.
    """

    pooled: Array
    tokens: Array


@dataclasses.dataclass(frozen=True)
class SelfDistillationTask(BaseTask):
    """A student that predicts its teacher's probabilities of prototypes.

    Attributes:
      num_prototypes, head_depth, head_hidden, head_bottleneck: see `heads.prototypes`.
      center_momentum: the momentum of the centers of the teacher's logits.
      student_temperature: the temperature of the student's logits.
      temperature: that of the teacher's, at the start and after `temperature_warmup`, a duration.
      momentum: that of the teacher's average, at the first step and at the end of the run.
      warmup_steps, num_steps: the lengths of the schedules, which training fills in.
    """

    num_prototypes: int = 65536
    head_depth: int = 3
    head_hidden: int = 2048
    head_bottleneck: int = 256
    center_momentum: float = 0.9
    student_temperature: float = 0.1
    temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: int | str = 0
    momentum: tuple[float, float] = (0.996, 1.0)
    warmup_steps: int = 0
    num_steps: int = 0

    learns_classes: ClassVar[bool] = False
    hides_patches: ClassVar[bool] = False

    filled_in: ClassVar[tuple[str, ...]] = ("warmup_steps", "num_steps")
    headline = "feature_distance"
    metric_info: ClassVar[Mapping[str, Metric]] = {
        "feature_distance": Metric(higher_is_better=True),
        "num_examples": COUNT,
    }

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> Self:
        """Returns the task around the backbone of `config.model`.

        Raises:
          UserError: a field has no such value, or the data has no such crops.
        """
        wanted = dict.fromkeys(VIEWS, "uint8 or float32 [crops, h, w, channels]")
        views = [info.spec[name] for name in wanted if name in info.spec]
        fits = len(views) == len(wanted) and all(len(view.shape) == 4 for view in views)
        name = cls.__module__.rpartition(".")[2]
        check_data(name, wanted, info, fits and views[0].shape[0] == 2)
        backbone = build_backbone(name, model, hides_patches=cls.hides_patches)
        if backbone.pooling != "token":
            raise UserError(
                f"task {name} compares class tokens; write config.model.pooling='token'"
            )
        task = cls(backbone, info, **fields)
        backbone = with_position_grid(backbone, task.seen_shapes())
        task = dataclasses.replace(task, model=backbone)
        task.check_fields()
        task.check_images()
        return dataclasses.replace(task, model=task.network())

    @property
    def image_spec(self) -> ArraySpec:
        """Returns the shape and the dtype of a global crop, as which images are evaluated."""
        crops = self.info.spec["global"]
        return crops._replace(shape=self.crop_shape("global"))

    def crop_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape `(height, width, channels)` of a crop as the student sees it."""
        return self.info.spec[name].shape[1:]

    def seen_shapes(self) -> list[tuple[int, ...]]:
        """Returns the shapes of all images that student and teachers see, global crops first."""
        return [self.crop_shape("global"), *(self.info.spec[name].shape[1:] for name in VIEWS)]

    def check_images(self) -> None:
        """Raises a `UserError` where crops do not fit the model or the fields."""
        for name in VIEWS:
            shape = self.crop_shape(name)
            check_geometry(self.model, shape, self.crop_to_patches)
            check_statistics(self.mean, self.std, shape[-1])

    def check_fields(self) -> None:
        """Raises a `UserError` where a field has no such value."""
        check_share(center_momentum=self.center_momentum)
        for share in self.momentum:
            check_share(momentum=share)
        # Schedules divide by the first momentum.
        check_positive(momentum=self.momentum[0], student_temperature=self.student_temperature)
        for value in self.temperature:
            check_positive(temperature=value)

    @abc.abstractmethod
    def network(self) -> SelfDistillation:
        """Returns the network of student and teacher around the backbone `self.model`."""

    def head(self, prototypes: int, hidden: int, bottleneck: int) -> PrototypeHead:
        """Returns a head of the task's depth."""
        return PrototypeHead(
            prototypes,
            depth=self.head_depth,
            hidden=hidden,
            bottleneck=bottleneck,
            dtype=self.model.dtype,
        )

    def with_duration(self, duration: Duration) -> Self:
        """Returns the task whose schedules end with the run."""
        warmup = duration(self.temperature_warmup, "task.temperature_warmup")
        return dataclasses.replace(self, warmup_steps=warmup, num_steps=duration.total)

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns normalized crops."""
        del key
        return {name: normalize(jnp.asarray(batch[name]), self.mean, self.std) for name in VIEWS}

    # The teacher.

    def init_state(self, params: Params, key: Array) -> dict[str, Any]:
        """Returns the teacher, which starts as the student."""
        del key
        return {"teacher": params}

    def next_state(
        self, task_state: Params, params: Params, batch: Batch, step: Array
    ) -> dict[str, Any]:
        """Returns the teacher, moved towards the student."""
        del batch
        return {"teacher": averaged(task_state["teacher"], params, self.momentum_at(step))}

    def momentum_at(self, step: Array | int) -> Array:
        """Returns the momentum of the average at a step, half a cosine."""
        first, last = self.momentum
        return first * method_schedules.dino(step, 0, self.num_steps, end=last / first)

    def temperature_at(self, step: Array | int) -> Array:
        """Returns the teacher's temperature at a step, which rises linearly."""
        return self.ramp(step, self.warmup_steps)

    def ramp(self, step: Array | int, length: int) -> Array:
        """Returns the temperature that rises from the first to the last within `length` steps."""
        first, last = self.temperature
        return last * method_schedules.dino(step, length, length, end=1.0, first=first / last)

    def step_metrics(self, task_state: Params, batch: Batch) -> dict[str, Array]:
        """Returns the entropy of the teacher's class probabilities: their own, and their mean's.

        The difference is the `mutual_information` of crops and prototypes: the mean KL divergence
        of a crop's probabilities from the mean over all crops. It is 0 after a collapse, in which
        all crops have the same probabilities. After a collapse to a single prototype both entropies
        are 0; after one to uniform outputs both are log(prototypes). Caron et al. 2021 (section
        5.3) describe both kinds, by another measure, the KL divergence of teacher and student.
        """
        del task_state
        p = batch["class_targets"]
        own, together = _entropy(p).mean(), _entropy(p.mean((0, 1)))
        return {
            "teacher_entropy": own,
            "prototype_entropy": together,
            "mutual_information": together - own,
        }

    def warnings(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Returns a line that names the collapse of the teacher, if there is one.

        The first steps do not count because a new head has nearly the same output for all images.
        """
        uniform = math.log(self.num_prototypes)
        collapsed = metrics["mutual_information"] <= _COLLAPSED * uniform
        if step < _QUIET_SHARE * self.num_steps or not collapsed:
            return []
        if metrics["teacher_entropy"] < uniform / 2:
            what = "the same few prototypes for every image"
        else:
            what = "all prototypes about equally for every image"
        return [f"collapse: the teacher chooses {what} (train/mutual_information is near 0)"]

    # The network.

    def encode(
        self, params: Params, crops: Array, masked: Array | None = None, key: Array | None = None
    ) -> Encoded:
        """Encodes crops `[batch, crops, h, w, channels]`; without a key nothing is dropped."""
        batch, count = crops.shape[:2]
        flat = crops.reshape(-1, *crops.shape[2:])
        masked = None if masked is None else masked.reshape(len(flat), -1)
        how: dict[str, Any] = {} if key is None else {"train": True, "rngs": {"dropout": key}}
        found = models.outputs_of(self.model, params, flat, masked, method="encode", **how)
        pooled = found.pooled.astype(jnp.float32).reshape(batch, count, -1)
        tokens = found.tokens.reshape(batch, count, *found.tokens.shape[1:])
        return Encoded(pooled, tokens)

    def class_logits(self, params: Params, x: Array) -> Array:
        """Maps class tokens `[..., width]` to float32 logits `[..., prototypes]`."""
        return models.outputs_of(self.model, params, x, method="class_logits")

    # Evaluation measures whether the features of different images differ.

    def inputs(self, batch: Batch | HostBatch) -> Array:
        """Returns the images of a batch, or the first global crop of each example."""
        images = jnp.asarray(batch["image"] if "image" in batch else batch["global"][:, 0])
        return normalize(images, self.mean, self.std)

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns `feature`, the class token as a vector of length 1."""
        found = models.outputs_of(self.model, params, self.inputs(batch), method="encode")
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
        # The teacher has no backward pass.
        return self.crop_flops(self.model.backbone, "global", 4) + self.crop_flops(
            self.model.backbone, "local", 3
        )

    def crop_flops(self, backbone: nn.Module, name: str, passes: int) -> int:
        """Returns the operations of `passes` forward passes of one kind of an example's crops."""
        height, width, channels = self.crop_shape(name)
        crops = self.info.spec[name].shape[0]
        return passes * crops * models.flops(backbone, (height, width), channels)


def _entropy(p: Array) -> Array:
    return -(p * jnp.log(jnp.maximum(p, 1e-20))).sum(-1)
