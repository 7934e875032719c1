"""A trained model's answers for image files, drawn on them, and where the model looked."""

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from vit_jax import attention, models, tasks
from vit_jax.checkpoints import evaluation_params, input_spec
from vit_jax.checkpoints.input_spec import InputSpec
from vit_jax.checkpoints.store import Store, flatten
from vit_jax.data import files
from vit_jax.data.placement import Placement
from vit_jax.data.tokenizer import open_tokenizer
from vit_jax.errors import UserError
from vit_jax.inference import convert
from vit_jax.inference.answers import Answers
from vit_jax.inference.preparation import (
    BATCH_SIZE,
    AsEvaluated,
    ByInputSpec,
    Picture,
    Pictures,
    Preparation,
    as_pictures,
    exif_of,
)
from vit_jax.report import figures, inside
from vit_jax.storage import path_text, write_atomically
from vit_jax.tasks import BaseTask, classification, contrastive, detection
from vit_jax.training.evaluate import step_of
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec, DataInfo, Params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained model for image files. It needs no dataset.

    predictor = Predictor.from_workdir("runs/photos")
    probability = predictor.predict(["photo.jpg"])["probability"]  # [1, classes]
    """

    task: BaseTask
    params: Params
    info: DataInfo
    preparation: Preparation

    @classmethod
    def open(
        cls,
        path: "Predictor | str | os.PathLike",
        *,
        texts: Sequence[str] = (),
        headless: bool = False,
        trust: Sequence[str] = (),
    ) -> "Predictor":
        """Returns the predictor of a workdir, or of a checkpoint in any format.

        Args:
          path: as `from_workdir` or as `from_checkpoint` takes it. A predictor is returned as it
            is.
          texts, headless, trust: as there.

        Raises:
          UserError: there is neither.
        """
        if isinstance(path, Predictor):
            return path
        path = path_text(path, "model")
        if Workdir.at(path):
            return cls.from_workdir(path, texts, trust)
        return cls.from_checkpoint(path, texts=texts, headless=headless)

    @classmethod
    def from_workdir(
        cls,
        path: str | os.PathLike,
        texts: Sequence[str] = (),
        trust: Sequence[str] = (),
        *,
        step: int | str | None = None,
    ) -> "Predictor":
        """Returns the predictor of a run's newest checkpoint, or of another one.

        Images are prepared as the run's evaluation prepares those of its first evaluation set.
        Averaged parameters are used if the run has them.

        Args:
          path: the workdir.
          texts: for a run that learned images with texts, the texts that images may match. They
            take the place of the task's own classes.
          trust: names of code from outside this package, as in `my_tasks:Task`, that the run's
            config names and that may run.
          step: the number of the step, or "best"; see `evaluate.step_of`. None is the newest.

        Raises:
          UserError: the workdir holds no run or no whole checkpoint, or the run reads no texts.
        """
        workdir = Workdir.existing(path)
        config, info = workdir.read_config(trust=trust), workdir.read_info()
        task = tasks.build(config.task, config.model, info)
        if texts:
            task = task.with_texts(texts)
        at = step_of(Store(workdir.checkpoints), config, step)
        params = task.inference_params(restore_params(workdir, task, at))
        height, width, channels = task.image_spec.shape
        preparation = AsEvaluated.by(config, (height, width, channels))
        return cls(task, params, info, preparation)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        *,
        model: str | None = None,
        fields: Mapping[str, Any] | None = None,
        image_size: tuple[int, int] | None = None,
        labels: str | None = None,
        texts: Sequence[str] = (),
        headless: bool = False,
    ) -> "Predictor":
        """Returns the classifier that a checkpoint of any format holds.

        Images are prepared as the files beside the checkpoint tell. If they tell nothing, a warning
        says what was assumed.

        Args:
          path: the checkpoint, as `vit_jax.checkpoints.load` takes it.
          model, fields: name and fields of the model, if the checkpoint does not tell them.
          image_size: (height, width) in pixels; None for the size that the checkpoint expects.
          labels: a text file with the name of one class in each line; None for the names in the
            checkpoint's `config.json`, if there are any.
          texts: the texts that images may match, for a folder of transformers or open_clip with
            both towers and a tokenizer (Radford et al. 2021, section 3.1.2); not with `labels`.
          headless: whether a checkpoint without a classifier head is accepted, for its features.

        Raises:
          UserError: the checkpoint cannot be read, or its model cannot be told.
        """
        path = path_text(path, "checkpoint")
        told, run = input_spec.read(path), Workdir.containing(path)
        size = image_size or (told.size if told else None)
        module, params, shape = convert.open_model(
            path, model=model, fields=fields, image_size=size, with_text=bool(texts)
        )
        num_classes: int = getattr(module, "num_classes", None) or 0
        if not num_classes and not headless and not texts:
            raise UserError(f"{path} has no classifier head; use the features command")
        if not num_classes and not texts:
            num_classes = 1
            module, params = models.Classifier(module, num_classes), {"backbone": params}
        spec = dataclasses.replace(told or InputSpec(), size=shape[:2])
        config = run and run.read_config()
        exif = exif_of(config) if config else "apply"
        preparation: Preparation = ByInputSpec(spec, shape[-1], exif)
        if config and not image_size:
            preparation = AsEvaluated.by(config, shape)
        elif config or not told:
            logger.warning(
                "%s does not tell how to prepare images; assumed: %s", path, spec.describe()
            )
        if {len(spec.mean), len(spec.std)} - {1, shape[-1]}:
            raise UserError(f"{path} is a model of {shape[-1]} channels, but has {spec.describe()}")
        statistics: dict[str, Any] = {"crop_to_patches": True, "mean": spec.mean, "std": spec.std}
        task = _task_of(path, module, shape, labels, texts, **statistics)
        return cls(task, params, task.info, preparation)

    def predict(self, pictures: Iterable[Picture]) -> dict[str, Any]:
        """Returns the task's answers for images, by name.

        A classifier answers `probability` float32 `[n, classes]`; a segmentation model `predicted`,
        the class of each pixel, uint8 `[height, width]` for each image; a detector `detected_boxes`
        `[n, k, 4]` as (y0, x0, y1, x1) in 0..1 of height and width, `detected_score` and
        `detected_label` `[n, k]`; an image-text model `image_vector` `[n, dim]`, and `probability`
        of its texts. Boxes and masks are those of the images as given, see `Answers`.

        Args:
          pictures: image files, or uint8 pixels `[height, width, 1 or 3]`, of any sizes; or the
            path of a single file.

        Raises:
          UserError: an image cannot be read or does not fit the model.
        """
        parts = [answers.outputs for answers in self.answers(as_pictures(pictures))]
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}

    def answers(self, pictures: Sequence[Picture]) -> Iterator[Answers]:
        """Yields the answers for batches of images, in the order of the images.

        Raises:
          UserError: an image cannot be read or does not fit the model.
        """
        start = 0
        for batch in self.batches(pictures):
            outputs = jax.device_get(self._predict(self.prepared_params, batch))
            real = batch.pop("mask") > 0
            here = self.preparation.pictures(pictures[start : start + int(real.sum())])
            prepared, outputs = ({k: x[real] for k, x in part.items()} for part in (batch, outputs))
            yield self._in_files(here, prepared, outputs)
            start += len(here)

    def batches(self, pictures: Sequence[Picture]) -> Iterator[dict[str, np.ndarray]]:
        """Yields prepared images, `image` `[n, height, width, channels]`, all batches of one size.

        `mask` float32 `[n]` is 0 where the last batch is filled up.

        Raises:
          UserError: there is no image, or one that cannot be read.
        """
        if not len(pictures):
            raise UserError("no images are given")
        source = self.preparation.pictures(pictures)
        return self.preparation.batches(source, min(BATCH_SIZE, len(pictures)))

    def settings(self) -> list[str]:
        """Returns, as texts, what the answers depend on besides the parameters and the images."""
        task = self.task
        prepared = self.preparation.settings()
        settings = (task.model, task.mean, task.std, getattr(task, "loss", None), *prepared)
        # The address of a function among a model's fields differs from process to process.
        return [re.sub(r" at 0x[0-9a-f]+", "", repr(one)) for one in settings]

    @functools.cached_property
    def prepared_params(self) -> Params:
        """The parameters together with what the task computes from them once."""
        return {**self.params, **jax.jit(self.task.precompute)(self.params)}

    @functools.cached_property
    def _predict(self) -> Any:
        return jax.jit(self.task.predict)

    def _in_files(
        self, pictures: Pictures, prepared: Mapping[str, np.ndarray], outputs: Mapping[str, Any]
    ) -> Answers:
        """Returns answers whose boxes and masks are those of the files."""
        in_files = getattr(self.task, "in_files", None)
        placements: list[Placement | None] = []
        for number in range(len(pictures)):
            # Only answers that have places need the size of the file, and where they lie in it.
            place = self.preparation.placement(pictures, number) if in_files else None
            if in_files and place is None:
                logger.warning(
                    "%s: its preparation cannot be undone; the answers are for the prepared image",
                    pictures.describe(number),
                )
            placements.append(place)
        if in_files:
            size = prepared["image"].shape[1:3]
            as_prepared = Placement((1.0, 1.0), (0.0, 0.0), size)
            outputs = in_files({**prepared, **outputs}, [x or as_prepared for x in placements])
        return Answers(pictures, prepared, outputs, placements)

    def draw(self, answers: Answers, out: str) -> None:
        """Writes a PNG with the images, the answers on them or below them, and their names.

        Raises:
          UserError: the file cannot be written.
        """
        draws_on_them = type(self.task).pictures is not BaseTask.pictures
        images = answers.images() if draws_on_them else answers.photographs()
        examples = {**answers.outputs, "image": images}
        captions = self.task.summaries(examples)
        grid = figures.image_grid(self.task.pictures(examples), captions, answers.names())
        _write_png(grid, out)

    def draw_attention(self, answers: Answers, out: str) -> None:
        """Writes a PNG of where the model looked in the images, of which it may see a part.

        For a single image it shows every head of every layer, the last layer's map and the rollout;
        for several images the last two of each.

        Raises:
          UserError: the model has no attention, or the file cannot be written.
        """
        images = answers.prepared["image"]
        inputs = jax.device_get(self.task.inputs({"image": images}))
        maps = attention.attention_maps(self.task.model, self.params, inputs)
        pictures = answers.views(self.preparation)
        if len(images) == 1:
            _write_png(attention.figure(pictures[0], maps), out)
        else:
            captions = self.task.summaries(answers.outputs)
            _write_png(attention.panel(pictures, maps, captions), out)

    def draw_patches(self, image: np.ndarray, out: str) -> None:
        """Writes a PNG of a prepared image, cut into the patches that the model reads.

        Raises:
          UserError: the model does not cut images into patches, or the file cannot be written.
        """
        backbone = self.task.model.backbone
        # Not the sides of the kernel, which a FlexiViT keeps at another size than it reads.
        sides = getattr(backbone, "patch_size", None)
        if sides is None or "stem" in self.params["backbone"]:
            name = type(backbone).__name__
            raise UserError(f"a {name} does not cut images into patches; a ViT or a Mixer does")
        patch = (sides, sides) if isinstance(sides, int) else tuple(sides)
        _write_png(inside.image_in_patches(image, patch), out)


def _task_of(
    path: str,
    module: Any,
    shape: tuple[int, int, int],
    labels: str | None,
    texts: Sequence[str],
    **statistics: Any,
) -> BaseTask:
    """Returns the task whose answers the head of a released model gives."""
    if isinstance(module, models.Detector | models.OpenVocabularyDetector):
        return _detection_task(path, module, shape, labels, texts, **statistics)
    if texts:
        return _matching_task(path, module, shape, texts, **statistics)
    info = _info_of(path, shape, module.num_classes, labels)
    loss = "sigmoid" if input_spec.has_independent_classes(path) else "softmax"
    return classification.Task(module, info, loss=loss, **statistics)


def _info_of(
    path: str, shape: tuple[int, int, int], num_classes: int, labels: str | None
) -> DataInfo:
    """Returns what a classifier is fed; its class names come from `labels` or lie beside `path`."""
    names = _read_labels(labels, num_classes) if labels else input_spec.class_names(path)
    image, label = ArraySpec(shape, np.dtype(np.uint8)), ArraySpec((), np.dtype(np.int32))
    fitting = names if len(names) == num_classes else None
    return DataInfo({"image": image, "label": label}, num_classes, fitting)


def _matching_task(
    path: str,
    module: Any,
    shape: tuple[int, int, int],
    texts: Sequence[str],
    **statistics: Any,
) -> BaseTask:
    """Returns the task that tells which of the texts fits an image.

    Raises:
      UserError: no folder is known in which the tokenizer of the texts may be.
    """
    vocab = _folder_of_tokenizer(path)
    arrays = {
        "image": ArraySpec(shape, np.dtype(np.uint8)),
        "tokens": ArraySpec((module.text_length,), np.dtype(np.int32), vocab),
    }
    loss = "softmax" if module.bias_init is None else "sigmoid"
    fields = {"vocab": vocab, "dim": module.dim, "loss": loss, **statistics}
    return contrastive.Task(module, DataInfo(arrays, 0), **fields).with_texts(texts)


def _detection_task(
    path: str,
    module: models.Detector | models.OpenVocabularyDetector,
    shape: tuple[int, int, int],
    labels: str | None,
    texts: Sequence[str],
    **statistics: Any,
) -> BaseTask:
    """Returns the task that tells where objects are: of the model's classes, or what texts name."""
    if isinstance(module, models.OpenVocabularyDetector):
        tokenizer = open_tokenizer(_folder_of_tokenizer(path), module.text_length)
        numbers = tokenizer.encode(list(texts)).tolist()
        module = module.clone(texts=tuple(map(tuple, numbers)))
        info = DataInfo({"image": ArraySpec(shape, np.dtype(np.uint8))}, len(texts), tuple(texts))
        return detection.Task(module, info, loss="focal", **statistics)
    info = _info_of(path, shape, module.num_classes - 1, labels)  # The last is "no object".
    return detection.Task(module, info, loss="softmax", **statistics)


def _folder_of_tokenizer(path: str) -> str:
    folder = input_spec.folder_of(path)
    if folder is None:
        raise UserError(f"{path} has no tokenizer beside it; download its folder")
    return os.fspath(folder)


def _joined(parts: Sequence[Any]) -> Any:
    """Returns the answers of several batches as one: an array, or a list where sizes differ."""
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    return [one for part in parts for one in part]


def _write_png(figure: Figure, out: str) -> None:
    try:
        write_atomically(epath.Path(out), figures.png(figure))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error


def restore_params(workdir: Workdir, task: BaseTask, step: int | None = None) -> Params:
    """Returns the parameters that a run's checkpoint is evaluated with; None is the newest.

    They are on the first device.

    Raises:
      UserError: there is no checkpoint, or it lacks some of the model's parameters.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    at = Store(workdir.checkpoints).newest() if step is None else step
    found = evaluation_params.read(workdir.checkpoints, at, here).params
    wanted = flatten(tasks.abstract_params(task))
    for name, like in sorted(wanted.items()):
        if name not in found or found[name].shape != like.shape:
            raise UserError(f"{workdir.checkpoints}: no array {name} in the checkpoint")
    named = {name: found[name].astype(like.dtype) for name, like in wanted.items()}
    return flax.traverse_util.unflatten_dict(named, sep=".")


def _read_labels(path: str, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes, one from each line of a text file."""
    names = tuple(files.lines(files.read_text(path)))
    if len(names) != num_classes:
        raise UserError(f"--labels={path} has {len(names)} lines, the model {num_classes} classes")
    return names
