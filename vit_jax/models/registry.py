"""The registry of models: finds and builds a model by its name.

A family is a public module of this package with a table `VARIANTS`. The registry finds it without
another list, so a new model needs only one new file.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from vit_jax.errors import UserError
from vit_jax.models import timm_names
from vit_jax.models.heads.classifier import Classifier
from vit_jax.plugins import HUB_PREFIX, Kind, check_fields, check_known, is_foreign, names_in


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named model: its module and fields.

    module: a Linen class whose `__call__(images, *, train)` returns `Features`.
    input_size: the side in pixels (for text, the number of tokens) in the table of models; None if
      the fields do not define a complete model.
    num_classes: the classes of the head in the table of models.
    """

    module: Callable[..., nn.Module]
    fields: Mapping[str, Any]
    input_size: int | None = 224
    num_classes: int | None = 1000


@functools.cache
def variants() -> Mapping[str, Variant]:
    """Returns every named model of all family modules of this package."""
    found: dict[str, Variant] = {}
    for name in names_in(__package__):
        family = importlib.import_module(f"{__package__}.{name}")
        found.update(getattr(family, "VARIANTS", {}))
    return found


def _nnx_advice(found: Any) -> str:
    """Returns what to do about a module of Flax NNX; "" for anything else."""
    is_nnx = any(base.__module__.startswith("flax.nnx") for base in getattr(found, "__mro__", ()))
    return (
        "a Flax NNX module needs a Linen module around it that calls it by"
        " `nnx.bridge.to_linen(...)` (docs/extending.md shows one)"
        if is_nnx
        else ""
    )


MODELS = Kind(
    "model",
    form="package.module:Class",
    accepts=lambda found: isinstance(found, type) and issubclass(found, nn.Module),
    others=variants,
    otherwise="the command `models` lists the names",
    advice=_nnx_advice,
)
"""The finder of models by canonical name."""


def names() -> list[str]:
    """Returns the sorted names of all models.

    Case matters only for `vit_g14` (giant) and `vit_G14` (gigantic).
    """
    return sorted(variants())


def build(name: str, *, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """Returns a model by name, with the fields in `overrides` replaced.

    name: a name in any common spelling (`vit_b16`, `ViT-B/16`, `B/16`, `R50+ViT-B/16`,
      `mixer_b16`), a name of timm (`vit_base_patch16_224`, `timm/vit_base_patch16_clip_224.openai`;
      see `models.timm_names`) or of the Hugging Face hub (`facebook/dinov2-base`, with or without
      `hf-hub:`; see `models.hub`), or `package.module:Class` for a module of your own that returns
      `Features`.
    num_classes: the length of the logits. 0 or None gives the bare backbone, which returns
      `Features`; with `representation_size` their pooled vector is that layer's output. Otherwise
      the model is a `Classifier`, whose own fields (`representation_size`, `head_bias_init`,
      `head_zero_init`) may be among the overrides.

    Raises:
      UserError: there is no such model or field, a required field is missing, or the values do not
        fit together.
    """
    variant = find_variant(name)
    head_fields = _field_names(Classifier) - {"backbone", "num_classes"}
    backbone_fields = _field_names(variant.module)
    for key in overrides:
        known = head_fields | backbone_fields
        check_known(key, known, repr(key), f"field of model {name!r}")
    where = f"model {name!r}, "
    owners: tuple[Any, ...] = (Classifier, variant.module)
    for owner in owners:
        check_fields(owner, overrides, where)
    if num_classes is not None:
        check_fields(Classifier, {"num_classes": num_classes}, where)
        if num_classes < 0:
            raise UserError(f"{where}num_classes={num_classes}: write a positive number, or 0")
    head = {key: value for key, value in overrides.items() if key in head_fields}
    fields = dict(variant.fields) | {k: v for k, v in overrides.items() if k not in head}
    missing = _required(variant.module) - fields.keys()
    if missing:
        raise UserError(f"model {name!r} needs {', '.join(sorted(missing))}; write them as fields")
    backbone = variant.module(**fields)
    if num_classes or head.get("representation_size"):
        return Classifier(backbone, num_classes or 0, **head)
    if head:
        raise UserError(
            f"{', '.join(sorted(head))} belong to the classification head; write num_classes too"
        )
    return backbone


def field_names(name: str) -> set[str]:
    """Returns the fields of the backbone of the model `name` that `build` accepts."""
    return _field_names(find_variant(name).module)


def find(name: str) -> str:
    """Returns the canonical form of a model's name. Raises `UserError` if there is none."""
    if isinstance(name, str):
        name = name.removeprefix(HUB_PREFIX)
    if is_foreign(name):
        MODELS.find(name)
        return name
    spellings: dict[str, list[str]] = {}
    for canonical in variants():
        spellings.setdefault(_squash(canonical).lower(), []).append(canonical)
    matches = spellings.get(_squash(name).lower()) if isinstance(name, str) and name else None
    if not matches and isinstance(name, str) and timm_names.find(name):
        return name
    if not matches and isinstance(name, str) and (close := timm_names.nearest(name)):
        raise UserError(f"model {name!r:.100} is unknown; did you mean {close!r}?")
    if not matches:
        return MODELS.find(name)  # Raises an error that suggests a name.
    # Only g (giant) and G (gigantic) differ by case alone, so the closest spelling is used.

    def agreement(canonical: str) -> int:
        return sum(a == b for a, b in zip(_squash(name), _squash(canonical), strict=True))

    return max(matches, key=agreement)


def _squash(name: str) -> str:
    """Removes separators and the name of the family: `R50+ViT-B_16` → `R50B16`."""
    return re.sub(r"[-_/+ ]|vit", "", name, flags=re.IGNORECASE) or "vit"


def find_variant(name: str) -> Variant:
    """Returns the model that a name stands for; see `build`. Raises `UserError`."""
    if is_foreign(name):
        return Variant(MODELS.find(name), {}, input_size=None)
    found = find(name)
    if found in variants():
        return variants()[found]
    origin = timm_names.find(found)
    assert origin is not None
    assert not isinstance(origin.image_size, tuple)
    module = variants()[origin.name].module
    return Variant(module, origin.fields, origin.image_size, origin.num_classes)


def _fields(module: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]


def _field_names(module: Any) -> set[str]:
    return {field.name for field in _fields(module)}


def _required(module: Any) -> set[str]:
    missing = dataclasses.MISSING
    fields = _fields(module)
    return {f.name for f in fields if f.default is missing and f.default_factory is missing}
