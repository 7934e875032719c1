"""The base class of tasks: the contract between a task and the rest of the package.

`vit_jax.training` (the step, the evaluation), `vit_jax.report` and `vit_jax.inference` call only
the methods of `BaseTask`. A new task defines `loss_fn`, `eval_sums`, `metrics`, `predict` and
`headline`, and overrides other methods as needed. See `tests/tasks/regression.py` for a complete
example, and `tests/tasks/own_teacher.py` for a task that owns state.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.augment.images import denormalize, normalize
from vit_jax.augment.spec import Augmentation
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.tasks._checks import check_geometry, check_statistics, only_params
from vit_jax.tracking.metrics import Metric
from vit_jax.types import Array, ArraySpec, Batch, DataInfo, HostBatch, Params


@dataclasses.dataclass(frozen=True)
class BaseTask(abc.ABC):
    """The base of a task, with defaults for all methods that a task need not override.

    The fields of a task are the keys of `config.task`. A batch is what the pipeline yields: arrays
    by name, whose leading axis is the batch. Losses are pairs (sum, count), so that the step can
    add up micro-batches: the loss of a batch is sum / count, both over the whole batch.

    A task whose answers have places in the image also defines `in_files(examples, placements)`,
    which returns the answers for the files that images were prepared from; see
    `vit_jax.data.placement`.

    Attributes:
      model: the backbone with its head.
      info: the arrays of an example, and the classes.
      mean, std: statistics that uint8 images are normalized by, in 0..255, one value or one for
        each channel; the defaults give [-1, 1].
      crop_to_patches: accept images whose last rows and columns fill no patch and are dropped.
    """

    model: nn.Module
    info: DataInfo
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)
    crop_to_patches: bool = False

    headline: ClassVar[str]
    """The metric that stands for the quality of a run, such as `accuracy`."""

    metric_info: ClassVar[Mapping[str, Metric]] = {}
    """The direction and the unit of each metric; see `vit_jax.tracking.metrics`."""

    num_shown: ClassVar[int] = 8
    """The number of examples that `sections` is given, at most."""

    filled_in: ClassVar[tuple[str, ...]] = ()
    """Fields that `with_duration` sets, which are no keys of `config.task`."""

    of_evaluation: ClassVar[tuple[str, ...]] = ()
    """Fields that training does not read, so that no stage of a run can change them."""

    placed_labels: ClassVar[tuple[str, ...]] = ()
    """Fields that label places in `image`, which must follow where preprocessing moves pixels."""

    learns_classes: ClassVar[bool] = True
    """False if training uses no labels: a checkpoint may then be of other classes than the data."""

    needs_whole_batch: ClassVar[bool] = False
    """True if the loss compares examples with each other, so that micro-batches do not add up.

    Such a task defines `loss_fn_of_parts` too.
    """

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "BaseTask":
        """Returns the task for data such as `info` describes.

        Args:
          model: `config.model`: a name and fields; with `num_classes` the model has a classifier.
          info: the arrays of an example, and the classes.
          **fields: the keys of `config.task` without its name.

        Raises:
          UserError: a field has no such value, or the data does not fit the task.
        """
        task = cls(models.build(**model), info, **fields)
        task.check_images()
        return task

    @property
    def image_spec(self) -> ArraySpec:
        """Returns the shape and the dtype of an image that the model is evaluated on.

        A task overrides this where its training examples have no `image`, but crops, for instance.
        """
        return self.info.spec["image"]

    def check_images(self) -> None:
        """Raises a `UserError` where images are missing, or do not fit the model or the fields."""
        image = self.info.spec.get("image")
        if image is None or len(image.shape) != 3:
            raise UserError("the data has no images [height, width, channels]")
        check_geometry(self.model, image.shape, self.crop_to_patches)
        check_statistics(self.mean, self.std, image.shape[-1])
        Augmentation.of(self).check(image)

    # Training.

    def init(self, key: Array) -> Params:
        """Returns fresh parameters, boxed with their logical axis names.

        Raises:
          UserError: the model has other variables, such as the running statistics of a batch norm.
        """
        images = jnp.zeros((1, *self.image_spec.shape), jnp.float32)
        return only_params(self.model.init(models.init_keys(key), images))

    def loaded_params(self) -> Params:
        """Returns parameters that replace those of `init` of the same name, such as a teacher's.

        The training calls this once, before the first step of a new run.

        Raises:
          UserError: they cannot be read.
        """
        return {}

    def frozen(self, params: Params, patterns: Sequence[str]) -> list[str]:
        """Returns regular expressions of the names of parameters that are not trained.

        Args:
          params: shapes of all parameters.
          patterns: `config.optim.freeze`, which is returned unless the task has parameters of its
            own that must not change.
        """
        del params
        return list(patterns)

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns the training batch as `loss_fn` takes it; runs on the device, on a whole batch.

        The default returns normalized images and `targets`, both changed as those fields of the
        task say that `Augmentation` has too.
        """

        def normalize(images: Array) -> Array:
            return self.inputs({**batch, "image": images})

        images, targets = Augmentation.of(self)(
            key, jnp.asarray(batch["image"]), self.targets(batch), normalize
        )
        return {"image": images, **targets}

    def hidden(self, batch: HostBatch) -> dict[str, np.ndarray]:
        """Returns which patches the model does not see, by the name of the images.

        The `data` command draws them dark. The default returns {}.

        Args:
          batch: the result of `augment`.

        Returns:
          bool `[batch, rows, columns]`, or `[batch, crops, rows, columns]` for crops.
        """
        del batch
        return {}

    # State of the task's own, such as a teacher that follows the student.

    def init_state(self, params: Params, key: Array) -> Params:
        """Returns the arrays that the task keeps from step to step besides the parameters.

        They are a part of the training state: saved, restored bit for bit, and updated inside the
        compiled step. An array whose path ends in that of a parameter of the same shape is sharded
        like it; all others are replicated. An entry `teacher`, which has the structure of `params`,
        is evaluated and published in the place of `params`. The default is {}, no state.

        Args:
          params: the first parameters of a run, without boxes. A new run that starts from a
            checkpoint, or a resumed run whose checkpoint lacks the state, gives the loaded ones.
          key: for random numbers.
        """
        del params, key
        return {}

    def add_targets(self, task_state: Params, batch: Batch, step: Array) -> Batch:
        """Returns the augmented batch with what follows from the task's state, for `loss_fn`.

        The step calls this once, on the whole batch and without gradients. It is the place for the
        outputs of a teacher, and for what is computed over the whole batch, such as centers. The
        leading axis of every array is the batch, also where the value is the same for all rows.

        Args:
          task_state: what `init_state` or `next_state` returned.
          batch: the result of `augment`.
          step: int32, the number of steps before this one.
        """
        del task_state, step
        return batch

    def add_targets_from(
        self, params: Params, task_state: Params, batch: Batch, step: Array
    ) -> Batch:
        """Does as `add_targets`, which this calls, for a step that starts from `params`.

        A task overrides this if its teacher is among the parameters, frozen.
        """
        del params
        return self.add_targets(task_state, batch, step)

    def next_state(self, task_state: Params, params: Params, batch: Batch, step: Array) -> Params:
        """Returns the state after a step, of the same structure, shapes and dtypes.

        A step that is skipped, because its loss is not finite, leaves the state as it was.

        Args:
          params: the parameters after the optimizer's update.
          batch: the whole batch as `add_targets` returned it.
          step: int32, the number of steps before this one.
        """
        del params, batch, step
        return task_state

    def step_metrics(self, task_state: Params, batch: Batch) -> dict[str, Array]:
        """Returns scalars to log with the loss; `batch` is what `add_targets` returned."""
        del task_state, batch
        return {}

    def warnings(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Returns lines that warn of a training that goes wrong, such as the collapse of a teacher.

        The log calls this for the metrics that it logs, and shows each line once, so that lines
        should not hold numbers that change. The default returns [].

        Args:
          metrics: the numbers of a step, with those of `step_metrics`.
          step: the number of steps that were made.
        """
        del metrics, step
        return []

    def with_duration(self, duration: Duration) -> "BaseTask":
        """Returns the task for a run of a length, which schedules of the task's own depend on.

        The training calls this before all other methods. The default returns the task itself.

        Args:
          duration: converts durations in any unit to steps; `duration.total` is the whole run.
        """
        del duration
        return self

    def train_flops(self) -> int:
        """Returns the floating-point operations of a training step for each of its examples.

        They are three times those of the model's forward pass, because each product has two in its
        backward pass. A task whose loss computes more or less than that overrides this.
        """
        height, width, channels = self.image_spec.shape
        return 3 * models.flops(self.model, (height, width), channels)

    def targets(self, batch: Batch) -> dict[str, Array]:
        """Returns the targets of the loss by name, for a training batch.

        The default returns everything but the images.
        """
        return {name: x for name, x in batch.items() if name != "image"}

    @abc.abstractmethod
    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the losses, number of terms) of a micro-batch, float32 scalars.

        Args:
          params: all parameters, as `init` makes them.
          batch: rows of the result of `augment`. Neither the sum nor the number may depend on which
            rows are in the same micro-batch, so `augment` must compute the normalizers of a loss.
          key: the random key of dropout.
        """

    def check_accumulation(self) -> None:
        """Raises a `UserError` if the loss cannot be computed in several micro-batches."""
        if self.needs_whole_batch and type(self).loss_fn_of_parts is BaseTask.loss_fn_of_parts:
            raise UserError("the task compares all examples of a batch; write accum_steps=1")

    def loss_fn_of_parts(self, params: Params, parts: Batch, key: Array) -> tuple[Array, Array]:
        """Returns `loss_fn` of a batch that is split into micro-batches along a new first axis.

        Only tasks with `needs_whole_batch` define it. They must not keep the activations of more
        than one micro-batch.
        """
        raise NotImplementedError

    # Evaluation and prediction. `params` are what `inference_params` returns, with `precompute`'s.

    def inference_params(self, params: Params) -> Params:
        """Returns the parameters of the model alone, as they are evaluated and published.

        A task overrides this where it trains other parameters, such as low-rank adapters, or keeps
        some for training alone, such as a teacher's. Parameters of the model alone pass unchanged.
        """
        return params

    def precompute(self, params: Params) -> Params:
        """Returns arrays to add to the parameters, under names that the model does not have.

        An evaluation computes them once, not for every batch.
        """
        del params
        return {}

    def inputs(self, batch: Batch | HostBatch) -> Array:
        """Returns the images of a batch from the pipeline as the model takes them."""
        return normalize(jnp.asarray(batch["image"]), self.mean, self.std)

    def shown(self, images: Array) -> Array:
        """Returns images as the model takes them, in the range of the pipeline's images.

        This is the inverse of `inputs`: uint8 where the pipeline yields uint8; other images pass
        unchanged, because they were not normalized.
        """
        if self.image_spec.dtype != np.uint8:
            return images
        return denormalize(images, self.mean, self.std)

    @abc.abstractmethod
    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns additive statistics of a batch; rows whose `mask` is 0 must not count."""

    def eval_rows(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the arrays that `metrics` needs of each example; the leading axis is the batch.

        The default is {}, for metrics that need only sums.
        """
        del params, batch
        return {}

    @abc.abstractmethod
    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the metrics of a split.

        Args:
          found: `eval_sums`, added up over the split, and `eval_rows` of its examples in order.
        """

    @abc.abstractmethod
    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the predictions for a batch by name; the leading axis is the batch."""

    def with_texts(self, texts: Sequence[str]) -> "BaseTask":
        """Returns a task that answers with one of `texts`, for `predict --text`.

        Raises:
          UserError: the task reads no texts.
        """
        raise UserError("--text is for runs that learned images and texts (task contrastive)")

    # Words and pictures. `examples` hold the arrays of the pipeline and those of `predict`.

    def result_lines(self, examples: Mapping[str, np.ndarray], top: int) -> list[list[str]]:
        """Returns at most `top` lines for each example, which the `predict` command prints.

        The default prints the results of `predict`.
        """
        images = self.info.spec
        names = [name for name in examples if name not in images and name != "mask"]
        rows = zip(*(examples[name] for name in names), strict=True)
        return [
            [f"{name}: {_short(value)}" for name, value in zip(names, row, strict=True)][:top]
            for row in rows
        ]

    def summaries(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """Returns one short line for each example, to write below its picture."""
        return [", ".join(lines) for lines in self.result_lines(examples, 1)]

    def pictures(self, examples: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Returns each image with its prediction drawn on it, uint8 `[h, w, 3 or 1]`.

        The default draws nothing.
        """
        return list(examples["image"])

    def sections(self, examples: Mapping[str, np.ndarray]) -> list:
        """Returns sections of the report for the first examples of a split."""
        del examples
        return []


RENAMED = {
    "perturb": "augment",
    "objective": "loss_fn",
    "captions": "summaries",
    "lines": "result_lines",
    "pictured": "num_shown",
    "answering": "with_texts",
}
"""Earlier names of methods and attributes, which tasks of users' own may still define."""


@functools.cache
def completed(task_class: type) -> type[BaseTask]:
    """Returns a task class with the defaults of `BaseTask` for what it leaves out.

    Raises:
      UserError: the class lacks a method without a default, or derives from `BaseTask` and defines
        a method by an earlier name, which nothing would call.
    """
    where = f"{task_class.__module__}:{task_class.__qualname__}"
    whole: abc.ABCMeta
    if issubclass(task_class, BaseTask):
        whole = task_class
        for old, name in RENAMED.items():
            if hasattr(task_class, old):
                raise UserError(
                    f"config.task.name={where!r} defines {old}; it is called {name} now"
                )
    else:
        renamed = {
            name: getattr(task_class, old)
            for old, name in RENAMED.items()
            if hasattr(task_class, old) and not hasattr(task_class, name)
        }
        texts = {name: getattr(task_class, name) for name in ("__module__", "__doc__")}
        bases = (task_class, BaseTask)
        whole = abc.ABCMeta(task_class.__name__, bases, {**texts, **renamed})
    missing = sorted(whole.__abstractmethods__)
    if not hasattr(whole, "headline"):
        missing.append("headline")
    if missing:
        raise UserError(f"config.task.name={where!r} does not define {', '.join(missing)}")
    return cast(type[BaseTask], whole)


def _short(value: np.ndarray) -> str:
    return np.array2string(np.asarray(value), precision=4, threshold=8, separator=", ")
