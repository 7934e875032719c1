"""What a trained run says of image files, drawn on them if asked; and where it looked."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from vit_jax import attention, models, tasks
from vit_jax.checkpoints import evaluation_params
from vit_jax.checkpoints.store import Store, flatten
from vit_jax.data import pp
from vit_jax.errors import UserError
from vit_jax.inference import convert
from vit_jax.report import figures, inside
from vit_jax.storage import write_atomically
from vit_jax.tasks import BaseTask, classification
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec, DataInfo, Params


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A task with its trained parameters, for image files. Needs no dataset.

    value_ops: the preprocessing ops that give uint8 images the range the task was trained on, for
      runs whose images the host made float32; they alone need TensorFlow.
    """

    task: BaseTask
    params: Params
    info: DataInfo
    value_ops: str = ""

    @classmethod
    def from_workdir(
        cls, path: str, texts: Sequence[str] = (), trust: Sequence[str] = ()
    ) -> "Predictor":
        """The newest checkpoint of a run; its averaged parameters where there are some.

        texts: what images may show, for a run that learned images and texts; the answer is one of
        them in the place of the task's own classes. trust: names of code from outside this
          package, as in `my_tasks:Task`, that the run's config names and that may run.

        Raises:
          UserError: no run or no whole checkpoint there, `texts` for a run that reads none, or
            images whose range is not told by `config.data.pp`.
        """
        workdir = Workdir.existing(path)
        config, info = workdir.read_config(trust=trust), workdir.read_info()
        value_ops = _value_ops(config.data.pp, info)
        task = tasks.build(config.task, config.model, info)
        if texts:
            task = task.with_texts(texts)
        params = task.inference_params(restore_params(workdir, task))
        return cls(task, params, info, value_ops)

    @classmethod
    def from_checkpoint(
        cls,
        path: str,
        *,
        model: str | None = None,
        fields: Mapping[str, Any] | None = None,
        image_size: tuple[int, int] | None = None,
        labels: str | None = None,
        headless: bool = False,
    ) -> "Predictor":
        """A checkpoint of any format, as a classifier of images in [-1, 1].

        model, fields: where the file does not tell its model. image_size: (height, width), where
        not the size that the checkpoint's positions are for. labels: a file with a class name a
        line. headless: a file without a head will do, for it is not used.

        Raises:
          UserError: the file cannot be read, or its model cannot be told.
        """
        module, params, shape = convert.open_model(
            path, model=model, fields=fields, image_size=image_size
        )
        num_classes = getattr(module, "num_classes", None)
        if not num_classes and not headless:
            raise UserError(f"{path} has no classifier head; use the features command")
        if not num_classes:
            num_classes = 1
            module, params = models.Classifier(module, num_classes), {"backbone": params}
        names = _read_labels(labels, num_classes) if labels else None
        image = ArraySpec(shape, np.dtype(np.uint8))
        label = ArraySpec((), np.dtype(np.int32))
        info = DataInfo({"image": image, "label": label}, num_classes, names)
        return cls(classification.Task(module, info, crop_to_patches=True), params, info)

    def read(self, paths: Sequence[str]) -> np.ndarray:
        """Image files as uint8 `[n, height, width, channels]` of the size the run was trained at.

        The shorter side is resized (antialiased, bilinear) and the centre cut out; an image of the
        right size is used as it is.

        Raises:
          UserError: a file that is missing or no image.
        """
        height, width, channels = self.info.spec["image"].shape
        return np.stack([_read_image(path, height, width, channels) for path in paths])

    def as_trained(self, images: np.ndarray) -> np.ndarray:
        """uint8 images as the run's pipeline would have given them to the task."""
        if not self.value_ops:
            return images
        return np.asarray(pp.build(self.value_ops)({"image": images}, None)["image"])

    def predict(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What the task says of uint8 images; for classification `probability` `[n, classes]`."""

        @jax.jit
        def run(params: Params, images: np.ndarray) -> dict[str, jax.Array]:
            params = {**params, **self.task.precompute(params)}
            return self.task.predict(params, {"image": images})

        return jax.device_get(run(self.params, self.as_trained(images)))

    def draw(self, images: np.ndarray, outputs: Mapping[str, np.ndarray], out: str) -> None:
        """Writes a PNG with the images and, on them, what `predict` said.

        Raises:
          UserError: the file cannot be written.
        """
        examples = {"image": images, **outputs}
        captions = self.task.summaries(examples)
        _write_png(figures.image_grid(self.task.pictures(examples), captions), out)

    def draw_attention(self, images: np.ndarray, captions: Sequence[str], out: str) -> None:
        """Writes a PNG of where the model looked.

        Of one image: every head of every layer, what the output is made from, and the rollout. Of
        several: the last two of each.

        Raises:
          UserError: the model has no attention, or the file cannot be written.
        """
        inputs = jax.device_get(self.task.inputs({"image": self.as_trained(images)}))
        maps = attention.attention_maps(self.task.model, self.params, inputs)
        if len(images) == 1:
            _write_png(attention.figure(images[0], maps), out)
        else:
            _write_png(attention.panel(images, maps, captions), out)

    def draw_patches(self, image: np.ndarray, out: str) -> None:
        """Writes a PNG of one image, cut into the patches that the model reads.

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


def _value_ops(text: str, info: DataInfo) -> str:
    """The ops of the training preprocessing `text` that uint8 images of a file lack."""
    if info.spec["image"].dtype == np.uint8:
        return ""
    found = pp.value_ops(text)
    if not found:
        raise UserError(
            f"the run learned from {info.spec['image'].dtype} images, and config.data.pp={text!r}"
            " does not tell their range; train on uint8 images, or with"
            f" {' or '.join(pp.VALUE_OPS)}"
        )
    return found


def _write_png(figure: Figure, out: str) -> None:
    try:
        write_atomically(epath.Path(out), figures.png(figure))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error


def restore_params(workdir: Workdir, task: BaseTask) -> Params:
    """The parameters that a run's newest checkpoint is evaluated with, on the first device.

    Raises:
      UserError: there is no checkpoint, or it lacks some of the model's parameters.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    newest = Store(workdir.checkpoints).newest()
    found = evaluation_params.read(workdir.checkpoints, newest, here).params
    wanted = flatten(tasks.abstract_params(task))
    for name, like in sorted(wanted.items()):
        if name not in found or found[name].shape != like.shape:
            raise UserError(f"{workdir.checkpoints}: no array {name} in the checkpoint")
    named = {name: found[name].astype(like.dtype) for name, like in wanted.items()}
    return flax.traverse_util.unflatten_dict(named, sep=".")


def _read_labels(path: str, num_classes: int) -> tuple[str, ...]:
    try:
        names = tuple(Path(path).read_text().removesuffix("\n").split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels={path}: {error}") from error
    if len(names) != num_classes:
        raise UserError(f"--labels={path} has {len(names)} lines, the model {num_classes} classes")
    return names


def _of_bytes(image: Image.Image) -> Image.Image:
    """`image` with a byte a pixel and channel: of 16 bits the upper 8, as TensorFlow decodes it.

    Pillow itself would make white of everything above 255.
    """
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))


def _read_image(path: str, height: int, width: int, channels: int) -> np.ndarray:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such image file")
    try:
        with Image.open(path) as file:
            image = _of_bytes(file).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from error
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image).reshape(height, width, channels)
