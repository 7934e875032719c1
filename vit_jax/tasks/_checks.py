"""Checks of the fields and the data that tasks have in common."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models.vit import VisionTransformer
from vit_jax.types import DataInfo, Params


def check_data(task: str, wanted: Mapping[str, str], info: DataInfo, fits: bool) -> None:
    """Raises a `UserError` that lists the arrays that are wanted and given, unless `fits`."""
    if not fits:
        given = {name: f"{s.dtype} {list(s.shape)}" for name, s in info.spec.items()}
        raise UserError(
            f"the data does not fit task {task}: it wants {dict(wanted)}, the pipeline"
            f" (config.data) gives {given}"
        )


def build_backbone(
    task: str, model: Mapping[str, Any], *, hides_patches: bool = True
) -> VisionTransformer:
    """Returns the ViT of `config.model` for a task that pre-trains it without labels.

    hides_patches: whether the model must not see some patches of an image.

    Raises:
      UserError: the model is no ViT alone, or drops patches, which the task does itself, or its
        patches come after convolutions.
    """
    backbone = models.build(**model)
    if not isinstance(backbone, VisionTransformer) or backbone.patch_drop:
        raise UserError(
            f"config.task.name={task!r} pre-trains a ViT alone; config.model must have no"
            " num_classes and no patch_drop"
        )
    if hides_patches and models.traits_of(backbone).has_stem:
        raise UserError(
            f"config.task.name={task!r} hides patches of pixels, but the patches of"
            f" {type(backbone).__name__} come after convolutions; write a model without them"
        )
    return backbone


def only_params(variables: Mapping[str, Any]) -> Params:
    """Returns the parameters of a model that has no other variables. Raises `UserError`."""
    others = ", ".join(sorted(variables.keys() - {"params"}))
    if others:
        raise UserError(
            f"config.model: the model has variables besides its parameters ({others}), which no run"
            " keeps; a norm without running statistics, such as LayerNorm or GroupNorm, has none"
        )
    return variables["params"]


def check_share(**values: float) -> None:
    """Raises a `UserError` unless each of `values`, keys of `config.task`, is from 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"config.task.{name}={value}: write a number from 0 to 1")


def check_not_negative(**values: float) -> None:
    """Raises a `UserError` if one of `values`, keys of `config.task`, is below 0."""
    for name, value in values.items():
        if value < 0:
            raise UserError(f"config.task.{name}={value}: write 0 or more")


def check_positive(**values: float) -> None:
    """Raises a `UserError` unless each of `values`, keys of `config.task`, is above 0."""
    for name, value in values.items():
        if value <= 0:
            raise UserError(f"config.task.{name}={value}: write a number above 0")


def check_ranges(most: float, **values: Sequence[float]) -> None:
    """Raises a `UserError` unless each of `values` is a range [low, high] above 0 and to `most`."""
    for name, (low, high) in values.items():
        if not 0 < low <= high <= most:
            bound = f", at most {most:g}" if math.isfinite(most) else ""
            raise UserError(
                f"config.task.{name}={[low, high]}: write two numbers above 0{bound}, the lower one"
                " first"
            )


def check_statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raises a `UserError` if `std` is not a valid divisor, or images have other channels."""
    for name, values in {"mean": mean, "std": std}.items():
        if len(values) not in (1, channels):
            raise UserError(
                f"config.task.{name} has {len(values)} numbers for {channels} channels; write one,"
                " or one for each channel"
            )
    if min(std) <= 0:
        raise UserError(f"config.task.std={list(std)}: write positive numbers, in 0..255")


def check_geometry(model: nn.Module, shape: tuple[int, ...], crop_to_patches: bool) -> None:
    """Raises a `UserError` if patches do not tile `shape` `(h, w, c)` and none may be dropped.

    An image without a single patch is refused in any case.
    """
    backbone = models.backbone_of(model)
    stride = models.token_stride(backbone)
    least = stride or (1, 1)
    if shape[0] < least[0] or shape[1] < least[1]:
        raise UserError(
            f"config.data.pp gives images of {shape[0]}×{shape[1]} pixels; the model needs"
            f" {least[0]}×{least[1]} or more"
        )
    if stride is None or crop_to_patches:
        return
    if shape[0] % stride[0] or shape[1] % stride[1]:
        raise UserError(
            f"config.model.patch_size={backbone.patch_size} does not divide the image of"
            f" {shape[0]}×{shape[1]} pixels into tokens of {stride[0]}×{stride[1]}; change"
            " config.data.pp's size, or drop the excess with"
            " --config.task.crop_to_patches=true"
        )
