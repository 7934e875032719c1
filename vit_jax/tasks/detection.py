"""Object detection: a box and a class for every object.

The batch has `image`, `boxes` and `box_label`. For evaluation it may have `box_crowd`, `box_area`
(see `vit_jax.data.boxes`), `content` if images are padded, and `image_size` if they were resized.
Boxes are (y0, x0, y1, x1) in 0..1 of the image without padding. An image may have no object at all.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax import models
from vit_jax.data.placement import Placement
from vit_jax.errors import UserError
from vit_jax.report import Section, drawing
from vit_jax.tasks import _average_precision
from vit_jax.tasks._base import BaseTask
from vit_jax.tasks._checks import check_data, check_share
from vit_jax.tasks._matching import assign, generalized_iou, l1, mosaic
from vit_jax.tracking.metrics import COUNT, SCORE, Metric
from vit_jax.tracking.plain_text import distinct
from vit_jax.types import Array, Batch, DataInfo, Params

LOSSES = ("focal", "softmax")
_TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Task(BaseTask):
    """Detection by proposals that are matched one to one with the objects.

    Attributes:
      head, num_queries, decoder_depth, pyramid, pyramid_width: see `models.Detector`.
      loss: "focal" (sigmoid, each class on its own; Lin et al. 2017) or "softmax" with a class for
        "no object" (Carion et al. 2020, DETR; YOLOS).
      class_weight, l1_weight, giou_weight: weights of the parts of the loss and of the matching.
      alpha, gamma: parameters of the focal loss.
      no_object_weight: the weight of proposals without an object in the softmax loss.
      mosaic: the probability that a batch is made of mosaics of four images each; see
        `_matching.mosaic`.
      erasing: see `augment.spec.Augmentation`.
      max_detections: the number of detections of an image that count, best first.
      show_above: the least score of a detection that pictures show.
    """

    head: str = "per_token"
    num_queries: int = 100
    decoder_depth: int = 2
    pyramid: Sequence[float] = ()
    pyramid_width: int = 256
    loss: str = "focal"
    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    no_object_weight: float = 0.1
    mosaic: float = 0.0
    erasing: float = 0.0
    max_detections: int = 100
    show_above: float = 0.3

    headline = "AP"
    placed_labels: ClassVar[tuple[str, ...]] = ("boxes",)
    of_evaluation: ClassVar[tuple[str, ...]] = ("max_detections", "show_above")
    metric_info: ClassVar[Mapping[str, Metric]] = {
        "AP*": SCORE,
        "AR": SCORE,
        "num_examples": COUNT,
    }

    @classmethod
    def create(cls, model: Mapping[str, Any], info: DataInfo, **fields: Any) -> "Task":
        """Returns the task around the backbone of `config.model`.

        Raises:
          UserError: a field has no such value, the data has no images with boxes, or the model
            makes fewer proposals than an image has room for objects.
        """
        task = cls(models.build(**model), info, **fields)
        if task.loss not in LOSSES:
            raise UserError(f"config.task.loss={task.loss!r}: write {' or '.join(LOSSES)}")
        wanted = {
            "image": "uint8 or float32 [height, width, channels]",
            "boxes": "float32 [objects, 4]",
            "box_label": "int32 [objects]",
        }
        fits = all(name in info.spec for name in wanted)
        if fits:
            image, corners, labels = (info.spec[name] for name in wanted)
            fits = len(image.shape) == 3 and corners.shape == (*labels.shape, 4)
        check_data("detection", wanted, info, fits)
        if not info.num_classes:
            raise UserError("task detection needs the classes of the objects; the data has none")
        task.check_images()
        check_share(mosaic=task.mosaic, show_above=task.show_above)
        if task.mosaic and (image.shape[0] % 2 or image.shape[1] % 2):
            raise UserError(f"config.task.mosaic needs even sides, not {list(image.shape[:2])}")
        softmax = task.loss == "softmax"
        detector = models.Detector(
            task.model,
            info.num_classes + softmax,
            head=task.head,
            num_queries=task.num_queries,
            decoder_depth=task.decoder_depth,
            prior=0.0 if softmax else 0.01,
            pyramid=task.pyramid,
            pyramid_width=task.pyramid_width,
        )
        task = dataclasses.replace(task, model=detector)
        task._check_room(labels.shape[0] * (4 if task.mosaic else 1))
        return task

    def _check_room(self, max_objects: int) -> None:
        """Raises a `UserError` if an image may have more objects than the model makes proposals."""
        shape = (1, *self.info.spec["image"].shape)
        key, images = jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)
        (_, boxes), _ = jax.eval_shape(lambda x: self.model.init_with_output(key, x), images)
        if boxes.shape[1] < max_objects:
            raise UserError(
                f"the model makes {boxes.shape[1]} proposals, but images have room for"
                f" {max_objects} objects; write a smaller config.data.args.max_objects, or more"
                " tokens (config.task.num_queries, config.model.num_registers, a smaller patch)"
            )

    def targets(self, batch: Batch) -> dict[str, Array]:
        """Returns `boxes` `[b, M, 4]` in 0..1 of the frame, and `box_label` `[b, M]`.

        Crowds get the label -1, as where there is no object.
        """
        boxes = jnp.asarray(batch["boxes"])
        if "content" in batch:
            boxes = boxes * jnp.tile(batch["content"], 2)[:, None]
        labels = jnp.asarray(batch["box_label"])
        if "box_crowd" in batch:
            labels = jnp.where(batch["box_crowd"], -1, labels)
        return {"boxes": boxes, "box_label": labels}

    def augment(self, batch: Batch, key: Array) -> Batch:
        """Returns normalized images with their objects, in mosaics where asked.

        Each row of `totals` `[b, 2]` is the same: the objects, and the images, of the batch.
        """
        objects = dict(super().augment(batch, jax.random.fold_in(key, 1)))
        images = objects.pop("image")
        if self.mosaic:
            images, objects = jax.lax.cond(
                jax.random.bernoulli(key, self.mosaic),
                lambda: mosaic(images, objects),
                lambda: (images, jax.tree.map(_room_for_four, objects)),
            )
        num_objects = (objects["box_label"] >= 0).sum(dtype=jnp.float32)
        totals = jnp.stack([num_objects, jnp.float32(len(images))])
        rows = jnp.broadcast_to(totals, (len(images), 2))
        return {"image": images, **objects, "totals": rows}

    def loss_fn(self, params: Params, batch: Batch, key: Array) -> tuple[Array, Array]:
        """Returns (sum of the losses of proposals and objects, number of objects).

        The softmax loss of the classes is DETR's: a mean over all proposals of the batch, weighted
        by class. It is multiplied here by the number of objects, which the step divides by. Both
        come from `augment`, because a micro-batch does not know them.
        """
        scores, boxes = models.outputs_of(
            self.model, params, batch["image"], train=True, rngs={"dropout": key}
        )
        truth, labels = batch["boxes"], batch["box_label"]
        real = labels >= 0
        costs = self._costs(*jax.lax.stop_gradient((scores, boxes)), truth, labels)
        matched = assign(costs, real)
        taken = jnp.take_along_axis(boxes, matched[..., None], axis=1)
        place = self.l1_weight * l1(taken, truth)
        place += self.giou_weight * (1 - generalized_iou(taken, truth))
        num_objects = real.sum(dtype=jnp.float32)
        losses, weights = self._class_losses(scores, labels, matched)
        class_loss = (losses * weights).sum()
        if self.loss == "softmax":
            objects, images = batch["totals"][0]
            nothing = images * scores.shape[1] - objects
            total_weight = objects + nothing * self.no_object_weight
            class_loss *= jnp.maximum(objects, 1) / jnp.maximum(total_weight, _TINY)
        return jnp.where(real, place, 0).sum() + self.class_weight * class_loss, num_objects

    def _costs(self, scores: Array, boxes: Array, truth: Array, labels: Array) -> Array:
        """Returns the cost of every proposal for every object, `[b, N, M]`."""
        if self.loss == "softmax":
            by_class = -jax.nn.softmax(scores)
        else:
            on, off = jnp.ones((1, 1, 1)), jnp.zeros((1, 1, 1))
            focal = [
                optax.sigmoid_focal_loss(scores, target, alpha=self.alpha, gamma=self.gamma)
                for target in (on, off)
            ]
            by_class = focal[0] - focal[1]
        chosen = jnp.maximum(labels, 0)[:, None]
        by_class = jnp.take_along_axis(by_class, chosen, axis=-1)
        pairs = boxes[:, :, None], truth[:, None]
        place = self.l1_weight * l1(*pairs) - self.giou_weight * generalized_iou(*pairs)
        return self.class_weight * by_class + place

    def _class_losses(
        self, scores: Array, labels: Array, matched: Array
    ) -> tuple[Array, Array | float]:
        """Returns the losses of the proposals' classes, and the weight of each loss.

        The class of a proposal is that of the object it is matched with. For softmax both results
        are `[b, N]`; the focal losses are `[b, N, classes]`, all of weight 1.
        """
        batch, num_proposals, width = scores.shape
        nothing = self.info.num_classes
        rows = jnp.arange(batch)[:, None]
        target = jnp.where(labels >= 0, matched, num_proposals)  # Beyond the end: dropped.
        classes = jnp.full((batch, num_proposals), nothing, jnp.int32)
        classes = classes.at[rows, target].set(labels, mode="drop")
        if self.loss == "softmax":
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, classes)
            return losses, jnp.where(classes == nothing, self.no_object_weight, 1.0)
        onehot = jax.nn.one_hot(classes, width)  # All zeros for "no object".
        focal = optax.sigmoid_focal_loss(scores, onehot, alpha=self.alpha, gamma=self.gamma)
        return focal, 1.0

    def eval_sums(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the number of real rows; `eval_rows` has the rest."""
        return {"examples": (batch["mask"] > 0).sum(dtype=jnp.int32)}

    def eval_rows(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the best detections of each image, and its objects."""
        shape = batch["box_label"].shape
        size = jnp.array(batch["image"].shape[1:3])
        truth = {
            "box_crowd": jnp.zeros(shape, bool),
            "box_area": jnp.zeros(shape, jnp.float32),
            "image_size": jnp.broadcast_to(size, (shape[0], 2)),
        }
        truth |= {name: batch[name] for name in (*truth, "boxes", "box_label") if name in batch}
        return {**truth, **self.predict(params, batch)}

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns the `max_detections` best detections of each image, best first.

        They are `detected_boxes` `[b, k, 4]` in 0..1 of the image without padding, `detected_score`
        and `detected_label`, both `[b, k]`.
        """
        scores, boxes = models.outputs_of(self.model, params, self.inputs(batch))
        if self.loss == "softmax":
            probability = jax.nn.softmax(scores)[..., :-1]
            label = probability.argmax(-1)
            score, chosen = jax.lax.top_k(
                probability.max(-1), min(self.max_detections, label.shape[1])
            )
            label = jnp.take_along_axis(label, chosen, axis=1)
        else:
            flat = jax.nn.sigmoid(scores).reshape(scores.shape[0], -1)
            score, index = jax.lax.top_k(flat, min(self.max_detections, flat.shape[1]))
            chosen, label = index // scores.shape[-1], index % scores.shape[-1]
        boxes = jnp.take_along_axis(boxes, chosen[..., None], axis=1)
        if "content" in batch:
            boxes = boxes / jnp.tile(batch["content"], 2)[:, None]
        return {
            "detected_boxes": boxes,
            "detected_score": score,
            "detected_label": label.astype(jnp.int32),
        }

    def in_files(
        self, examples: Mapping[str, np.ndarray], placements: Sequence[Placement]
    ) -> dict[str, Any]:
        """Returns the detections with boxes in 0..1 of the files that images were prepared from.

        examples: images as the pipeline yields them, with the outputs of `predict`.
        """
        frame = np.array(examples["image"].shape[1:3])
        contents = examples.get("content", np.ones((len(placements), 2)))
        triples = zip(examples["detected_boxes"], contents, placements, strict=True)
        boxes = [place.boxes(found, frame * content) for found, content, place in triples]
        kept = {name: examples[name] for name in ("detected_score", "detected_label")}
        return {"detected_boxes": np.stack(boxes), **kept}

    def metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns COCO's `AP`, `AP50`, `AP75`, `AP_small`, ..., `AR`, `AP/CLASS`, `num_examples`.

        Means are over the classes that occur. A metric without any object, such as the AP of a
        class that does not occur, is left out, except for `AP`, which is then 0.
        """
        rows = {name: array for name, array in found.items() if name != "examples"}
        names = self._names()
        curves = _average_precision.curves(rows, len(names), self.max_detections)
        precision = curves.precision
        values = {
            "AP": precision[:, :, 0],
            "AP50": precision[0, :, 0],
            "AP75": precision[5, :, 0],
            **{
                f"AP_{name}": precision[:, :, i]
                for i, name in enumerate(_average_precision.AREAS)
                if i
            },
            "AR": curves.recall[:, :, 0],
            **{f"AP/{x}": precision[:, i, 0] for i, x in enumerate(distinct(names))},
        }
        means = {name: float(np.nanmean(x)) for name, x in values.items() if not np.isnan(x).all()}
        return {"AP": 0.0, **means, "num_examples": int(found["examples"])}

    def summaries(self, examples: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the objects found in each image, best first, on one line."""
        return [", ".join(texts) or "nothing" for _, _, texts in self._shown(examples)]

    def result_lines(self, examples: Mapping[str, np.ndarray], top: int) -> list[list[str]]:
        """Returns the `top` best objects of each image: score, class and box."""
        names, found = self._names(), []
        for boxes, scores, labels in _by_image(examples):
            rows = list(zip(boxes, scores, labels, strict=True))[:top]
            found.append(
                [
                    f"{score:7.2%}  {names[label]}  ({', '.join(f'{x:.3f}' for x in box)})"
                    for box, score, label in rows
                ]
            )
        return found

    def pictures(self, examples: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Returns each image with the boxes of the objects found."""
        contents = examples.get("content", np.ones((len(examples["image"]), 2)))
        drawn = zip(examples["image"], contents, self._shown(examples), strict=True)
        return [
            drawing.with_boxes(image, boxes * np.tile(content, 2), labels, texts)
            for image, content, (boxes, labels, texts) in drawn
        ]

    def sections(self, examples: Mapping[str, np.ndarray]) -> list[Section]:
        """Returns a section that compares predictions with the ground truth."""
        from vit_jax.report import inside  # matplotlib, which training can do without

        names, truth = self._names(), []
        for row, image in enumerate(examples["image"]):
            real = examples["box_label"][row] >= 0
            labels = examples["box_label"][row][real]
            boxes = examples["boxes"][row][real]
            boxes = (
                boxes * np.tile(examples["content"][row] if "content" in examples else 1.0, 4)[:4]
            )
            texts = [names[label] for label in labels]
            truth.append(drawing.with_boxes(image, boxes, labels, texts))
        text = f"Objects with a score of at least {self.show_above:g}."
        pictures = [drawing.rgb(image) for image in examples["image"]]
        rows = {"truth": truth, "predicted": self.pictures(examples)}
        panel = inside.attention_panel(pictures, rows)
        alt = "Images, with boxes of the true objects and boxes of the predicted ones below them."
        return [Section("Detections beside the truth", text, panel, alt=alt)]

    def _shown(self, examples: Mapping[str, np.ndarray]) -> list[tuple]:
        """Returns boxes, labels and texts of the detections of each image that are shown."""
        names, shown = self._names(), []
        for boxes, scores, labels in _by_image(examples):
            kept = scores >= self.show_above
            pairs = zip(labels[kept], scores[kept], strict=True)
            texts = [f"{names[label]} {score:.0%}" for label, score in pairs]
            shown.append((boxes[kept], labels[kept], texts))
        return shown

    def _names(self) -> tuple[str, ...]:
        return self.info.class_names or tuple(map(str, range(self.info.num_classes)))


def _by_image(examples: Mapping[str, np.ndarray]) -> zip:
    names = ("detected_boxes", "detected_score", "detected_label")
    return zip(*(examples[name] for name in names), strict=True)


def _room_for_four(x: Array) -> Array:
    """Returns objects `[b, M, ...]` with the room that mosaics need, `[b, 4 M, ...]`."""
    value = -1 if x.ndim == 2 else 0
    widths = [(0, 0), (0, 3 * x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, widths, constant_values=value)
