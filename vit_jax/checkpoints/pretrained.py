"""`vit_jax.build`: a model by name, with weights that others have published."""

from typing import Any, Literal, overload

import flax.linen as nn

from vit_jax import models
from vit_jax.checkpoints import hub
from vit_jax.checkpoints.loading import load
from vit_jax.checkpoints.released import PRETRAINED
from vit_jax.errors import UserError
from vit_jax.types import Params


@overload
def build(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: Literal[False] = False,
    image_size: None = None,
    **overrides: Any,
) -> nn.Module: ...


@overload
def build(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: Literal[True] | str,
    image_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> tuple[nn.Module, Params]: ...


def build(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool | str = False,
    image_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> nn.Module | tuple[nn.Module, Params]:
    """Returns a model by name, or with `pretrained` the model and its parameters.

        model = vit_jax.build("vit_b16", num_classes=1000)
        model, params = vit_jax.build("facebook/dinov2-base", pretrained=True)
        features = model.apply({"params": params}, images)  # pooled: float32 [n, 768]

    Args:
      name: a name of this package in any spelling (`vit_b16`, `ViT-B/16`), of timm
        (`vit_base_patch16_224.augreg_in21k`) or of the Hugging Face hub (`facebook/dinov2-base`),
        or `package.module:Class` for a module of your own.
      num_classes: the length of the logits, float32 `[n, num_classes]`. 0 or None gives the bare
        backbone, which returns `vit_jax.types.Features`.
      pretrained: True loads the published weights of that name, which may fetch them:
        `list_models(pretrained=True)` lists the names, and those of `models --released` have the
        weights that were pre-trained on ImageNet-21k. A text is the address of other weights for
        this model, as `checkpoints.load` takes it. A head of another number of classes starts at
        zero.
      image_size: with `pretrained`: the side of the images in pixels, or (height, width), to which
        the positions are resized; None keeps the positions of the weights.
      overrides: fields of the model that are replaced; see `vit_jax.models.build`.

    Returns:
      A Linen module that takes normalized float images `[n, height, width, channels]`; with
      `pretrained` (module, parameters), the latter nested dictionaries of float32 NumPy arrays.

    Raises:
      UserError: there is no such model, field or weights, or the weights do not fit the model.
    """
    model = models.build(name, num_classes=num_classes, **overrides)
    if not pretrained:
        if image_size is not None:
            raise UserError("build: image_size resizes weights, so it needs pretrained")
        return model
    address = _address_of(name) if pretrained is True else pretrained
    return model, load(address, model, image_size=image_size)


def _address_of(name: str) -> str:
    """Returns the address of the published weights of a model. Raises `UserError`."""
    address = hub.address_of(name) or PRETRAINED.get(models.find(name))
    if address:
        return address
    raise UserError(
        f"no published weights are known for {name!r}; `vit-jax models --pretrained` lists those on"
        " the hub, `vit-jax models --released` those of AugReg; or write pretrained=ADDRESS"
    )
