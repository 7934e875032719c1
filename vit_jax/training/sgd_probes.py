"""Linear classifiers of frozen tokens at every evaluation: of images, or of the patches of images.

`config.eval.probes.rates` switches them on. They are trained anew at each evaluation, from the same
numbers, so that a run that was stopped finds what the whole run finds.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.errors import UserError
from vit_jax.models.intermediate import last_layers
from vit_jax.models.layers.basic import token_stride
from vit_jax.models.vit import VisionTransformer
from vit_jax.parallel import sharding
from vit_jax.tasks import BaseTask
from vit_jax.training.linear_probe import Probes, appended, sweep, trained
from vit_jax.training.neighbors import Labelled
from vit_jax.types import Array, Batch, Params

_SEGMENTATION = "segmentation"
_PATCHES = ("tokens", "shares")


def check(backbone: nn.Module, settings: Mapping[str, Any]) -> None:
    """Raises a `UserError` unless the backbone has the blocks that the classifiers read."""
    if not isinstance(backbone, VisionTransformer):
        raise UserError("config.eval.probes.rates reads the blocks of a ViT; write rates=[]")
    most = max(settings["blocks"], default=0)
    if not 1 <= most <= backbone.depth:
        raise UserError(
            f"config.eval.probes.blocks={settings['blocks']}: write one number or more, 1 to"
            f" {backbone.depth}"
        )


def class_rows(
    backbone: VisionTransformer, params: Params, images: Array, settings: Mapping[str, Any]
) -> dict[str, Array]:
    """Returns the features `[batch, dim]` of images by name, one for each entry of `blocks`."""
    layers = last_layers(backbone, params, images, max(settings["blocks"]))
    return {
        f"blocks_{count}": appended(layers, count, settings["average"]).astype(jnp.float32)
        for count in settings["blocks"]
    }


def accuracies(
    known: Mapping[str, np.ndarray],
    splits: Mapping[str, Mapping[str, np.ndarray]],
    num_classes: int,
    settings: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
    """Returns `{split: {"sgd_N": accuracy}}` of the last N blocks, that of the best rate.

    Args:
      known: the rows of `class_rows` and `label`, for the images that the classifiers learn.
      splits: such rows of each split.
    """
    results: dict[str, dict[str, float]] = {name: {} for name in splits}
    for count in settings["blocks"]:
        key = f"blocks_{count}"
        tests = {name: Labelled(rows[key], rows["label"]) for name, rows in splits.items()}
        train = Labelled(known[key], known["label"])
        found = sweep(train, tests, num_classes, **_options(settings))
        for name, values in found.items():
            results[name][f"sgd_{count}"] = float(values.max())
    return results


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("rates", "epochs", "batch_norm")}


@dataclasses.dataclass(frozen=True)
class PatchProbes:
    """Linear classifiers of frozen patch tokens, for segmentation: one example for each patch.

    (Oquab et al. 2023, DINOv2, section 7.4: "linear".) The target of a patch is the share of each
    class among its pixels. For the metric, logits of patches are resized bilinearly to the pixels.

    Attributes:
      task: whose backbone is measured, and which prepares images.
      mesh: the devices.
      settings: `config.eval.probes`, complete.
      num_classes: pixels of other numbers than 0 to `num_classes` - 1 count for nothing.
    """

    task: BaseTask
    mesh: Mesh
    settings: Mapping[str, Any]
    num_classes: int

    def measure(
        self,
        params: Params,
        known: Callable[[], Iterable[Batch]],
        splits: Mapping[str, Callable[[], Iterable[Batch]]],
    ) -> dict[str, dict[str, float]]:
        """Returns `{split: {"sgd_miou_N": value}}` of the last N blocks, that of the best rate.

        Args:
          params: of the backbone, over the mesh.
          known: opens the placed batches that the classifiers learn from; splits: those of each
            split. Every batch has `image`, `segmentation` int `[batch, h, w, 1]` and `mask`.
        """
        results: dict[str, dict[str, float]] = {name: {} for name in splits}
        for count in self.settings["blocks"]:
            with sharding.activate(self.mesh):
                found = [jax.device_get(self._rows(count, params, batch)) for batch in known()]
            real = np.concatenate([part["mask"] for part in found]) > 0
            tokens, shares = (
                np.concatenate([part[name] for part in found])[real] for name in _PATCHES
            )
            flat = (x.reshape(-1, x.shape[-1]) for x in (tokens, shares))
            probes, fitted = trained(Labelled(*flat), self.num_classes, **_options(self.settings))
            whole = jax.device_get(fitted)
            counted = functools.partial(self._confusions, probes, count, whole, params)
            for name, batches in splits.items():
                with sharding.activate(self.mesh):
                    parts = [jax.device_get(counted(one)) for one in batches()]
                total = np.stack(parts).sum(0, dtype=np.int64)
                results[name][f"sgd_miou_{count}"] = mean_iou(total)
        return results

    @functools.cached_property
    def _rows(self) -> Callable[..., dict[str, Array]]:
        """Returns `rows`, compiled once for each number of blocks."""
        everywhere = sharding.replicated(self.mesh)
        return jax.jit(self.rows, static_argnums=0, out_shardings=everywhere)

    @functools.cached_property
    def _confusions(self) -> Callable[..., Array]:
        """Returns `confusions`, compiled once for each number of blocks."""
        everywhere = sharding.replicated(self.mesh)
        return jax.jit(self.confusions, static_argnums=(0, 1), out_shardings=everywhere)

    def rows(self, count: int, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns `tokens` `[batch, patches, dim]` of `count` blocks, and `shares` of classes."""
        tokens, (rows, columns), marks = self._tokens(count, params, batch)
        height, width = marks.shape[1] // rows, marks.shape[2] // columns
        marks = marks[:, : rows * height, : columns * width]
        pixels = jax.nn.one_hot(marks, self.num_classes)
        cells = pixels.reshape(len(marks), rows, height, columns, width, -1)
        shares = cells.mean((2, 4)).reshape(len(marks), rows * columns, -1)
        return {"tokens": tokens, "shares": shares, "mask": batch["mask"]}

    def _tokens(
        self, count: int, params: Params, batch: Batch
    ) -> tuple[Array, tuple[int, int], Array]:
        """Returns the tokens of `rows`, their grid, and the classes of the pixels that they cover.

        The last rows and columns of an image may fill no patch; see `crop_to_patches`.
        """
        backbone, images = self.task.model.backbone, self.task.inputs(batch)
        layers = last_layers(backbone, params, images, count)
        stride = token_stride(backbone)
        assert stride is not None
        grid = images.shape[1] // stride[0], images.shape[2] // stride[1]
        marks = batch[_SEGMENTATION][..., 0]
        sides = zip(marks.shape[1:], images.shape[1:3], grid, stride, strict=True)
        height, width = (held * number * step // side for held, side, number, step in sides)
        tokens = jnp.concatenate([*layers.patches], axis=-1).astype(jnp.float32)
        return tokens, grid, marks[:, :height, :width]

    def confusions(
        self, probes: Probes, count: int, fitted: Params, params: Params, batch: Batch
    ) -> Array:
        """Returns the confusion matrix of each classifier, int32 `[rates, classes, classes]`.

        Rows are the truth. A pixel whose logits are not finite is wrong, and one that is in no
        patch does not count.
        """
        tokens, grid, marks = self._tokens(count, params, batch)
        marks, classes = marks.astype(jnp.int32), self.num_classes
        logits = probes.logits(fitted, tokens.reshape(-1, tokens.shape[-1]))
        logits = logits.reshape(len(probes.rates), len(marks), *grid, classes)
        real = (marks >= 0) & (marks < classes) & (batch["mask"] > 0)[:, None, None]

        def counted(maps: Array) -> Array:
            whole = jax.image.resize(maps, (*marks.shape, classes), "bilinear")
            finite = jnp.isfinite(whole).all(-1)
            answers = jnp.where(finite, whole.argmax(-1), (marks + 1) % classes)
            pairs = jnp.where(real, marks * classes + answers, classes**2)
            return jnp.bincount(pairs.ravel(), length=classes**2).reshape(classes, classes)

        return jax.lax.map(counted, logits)


def mean_iou(confusion: np.ndarray | Sequence[np.ndarray]) -> float:
    """Returns the mean over classes that occur of intersection / union, of the best classifier."""
    best = 0.0
    for matrix in confusion:
        both = np.diag(matrix).astype(np.float64)
        union = matrix.sum(0) + matrix.sum(1) - both
        if union.any():
            best = max(best, float((both[union > 0] / union[union > 0]).mean()))
    return best
