"""From the name of a model, as people write it, to a module.

A family is a public module of this package with a table `VARIANTS`; finding it takes no list
elsewhere, so that a new model is one new file.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from vit_jax.errors import UserError
from vit_jax.models.heads.classifier import Classifier
from vit_jax.plugins import Kind, check_fields, check_known, is_foreign, names_in


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named model: the module and the fields that make it.

    module: a Linen class whose `__call__(images, *, train)` returns `Features`.
    input_size: side in pixels (for text, number of tokens) at which it is listed; None where the
      fields do not make a whole model. num_classes: of the head it is listed with.
    """

    module: Callable[..., nn.Module]
    fields: Mapping[str, Any]
    input_size: int | None = 224
    num_classes: int | None = 1000


@functools.cache
def variants() -> Mapping[str, Variant]:
    """Every named model, from all family modules of this package."""
    found: dict[str, Variant] = {}
    for name in names_in(__package__):
        family = importlib.import_module(f"{__package__}.{name}")
        found.update(getattr(family, "VARIANTS", {}))
    return found


MODELS = Kind(
    "model",
    form="package.module:Class",
    accepts=lambda found: isinstance(found, type) and issubclass(found, nn.Module),
    others=variants,
    otherwise="`python -m vit_jax models` lists the names",
)
"""Where a model is looked for, by its canonical name."""


def names() -> list[str]:
    """Names of all models, sorted. `vit_g14` is giant, `vit_G14` gigantic: case counts there."""
    return sorted(variants())


def build(name: str, *, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """A model by name, with any of its fields replaced.

    name: as people write it (`vit_b16`, `ViT-B/16`, `B/16`, `R50+ViT-B/16`, `mixer_b16`), or
      `package.module:Class` for a module of your own that returns `Features`.
    num_classes: length of the logits. 0 or None gives the bare backbone, which returns `Features`;
      otherwise a `Classifier`, whose own fields (`representation_size`, `head_bias_init`,
      `head_zero_init`) may be among the overrides.

    Raises:
      UserError: no such model or field, a field left out, or values that do not go together.
    """
    variant = _variant(name)
    head_fields = _field_names(Classifier) - {"backbone", "num_classes"}
    backbone_fields = _field_names(variant.module)
    for key in overrides:
        known = head_fields | backbone_fields
        check_known(key, known, repr(key), f"field of model {name!r}")
    where = f"model {name!r}, "
    for owner in (Classifier, variant.module):
        check_fields(owner, overrides, where)
    if num_classes is not None:
        check_fields(Classifier, {"num_classes": num_classes}, where)
    head = {key: value for key, value in overrides.items() if key in head_fields}
    fields = dict(variant.fields) | {k: v for k, v in overrides.items() if k not in head}
    missing = _required(variant.module) - fields.keys()
    if missing:
        raise UserError(f"model {name!r} needs {', '.join(sorted(missing))}; write them as fields")
    backbone = variant.module(**fields)
    if num_classes:
        return Classifier(backbone, num_classes, **head)
    if head:
        raise UserError(
            f"{', '.join(sorted(head))} belong to the classification head; write num_classes too"
        )
    return backbone


def field_names(name: str) -> set[str]:
    """The fields of a model's backbone that `build` takes, by the model's name."""
    return _field_names(_variant(name).module)


def find(name: str) -> str:
    """The canonical form of a model's name. Raises `UserError` if there is none."""
    spellings: dict[str, list[str]] = {}
    for canonical in variants():
        spellings.setdefault(_squash(canonical).lower(), []).append(canonical)
    matches = spellings.get(_squash(name).lower()) if isinstance(name, str) and name else None
    if not matches:
        MODELS.find(name)  # Raises an error that suggests a name.
    # Only g (giant) and G (gigantic) differ by case alone; the closest spelling is meant.

    def agreement(canonical: str) -> int:
        return sum(a == b for a, b in zip(_squash(name), _squash(canonical), strict=True))

    return max(matches, key=agreement)


def _squash(name: str) -> str:
    """`R50+ViT-B_16` → `R50B16`: separators and the family's own name carry nothing."""
    return re.sub(r"[-_/+ ]|vit", "", name, flags=re.IGNORECASE) or "vit"


def _variant(name: str) -> Variant:
    return Variant(MODELS.find(name), {}) if is_foreign(name) else variants()[find(name)]


def _fields(module: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]


def _field_names(module: Any) -> set[str]:
    return {field.name for field in _fields(module)}


def _required(module: Any) -> set[str]:
    missing = dataclasses.MISSING
    fields = _fields(module)
    return {f.name for f in fields if f.default is missing and f.default_factory is missing}
