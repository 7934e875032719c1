"""The families of models of Hugging Face transformers that are read.

A family is a public module of this package with an object `FAMILY`: the names of the arrays, the
defaults of the config and the fields that the config tells. A new family is one new file here.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.weights import Renames
from vit_jax.plugins import Kind

State = dict[str, np.ndarray]
Config = Mapping[str, Any]


def _as_it_is(state: State) -> State:
    return state


def _no_fields(config: Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    del config, state
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Models of transformers that share the names of their arrays.

    Attributes:
      label: the codebase, for messages.
      model_types: the values of `model_type` in the configs of these models.
      marks: a regular expression that finds a name which no family before has, in the order of
        their names, so that a file without its config is recognized.
      names: the names of arrays, with "/" for "." and without prefixes.
      prefixes: prefixes of names, of which the first that fits is removed.
      unused: regular expressions of the names that no encoder needs, each with the reason.
      defaults: the values of keys that a config may leave out. by_type: those that differ for one
        `model_type`, by that name.
      section: the key of the part of a config that describes the image tower, if there is one.
      prepare: returns a state dict with joined arrays split and folded arrays added, so that
        `names` has a place for every array.
      fields: returns the fields of the model that arrays do not show, from the config and the
        prepared state dict.
      interpolation: the resizing of positions; see `surgery.resize_positions`. interpolations: the
        one of a `model_type` where it differs, by that name.
      gated: the activations that a gate may have in a config; the gate is SiLU.
      text: the family of the text towers beside these image towers, if there are any.
      outer: prefixes of the names of both towers, of which the first that fits is removed.
      detector: fields of `models.Detector` that arrays do not show, if that is the model's head.
      by_texts: a regular expression of the names of a head that detects what texts name, which is
        read together with both towers alone. replaced: of the names that it makes useless.
    """

    label: str = "Hugging Face transformers"
    model_types: tuple[str, ...]
    marks: str
    names: Renames
    prefixes: tuple[str, ...] = ()
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Config = dataclasses.field(default_factory=dict)
    by_type: Mapping[str, Config] = dataclasses.field(default_factory=dict)
    section: str = ""
    prepare: Callable[[State], State] = _as_it_is
    fields: Callable[[Config, Mapping[str, np.ndarray]], dict[str, Any]] = _no_fields
    interpolation: str = "torch_bicubic"
    interpolations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gated: tuple[str, ...] = ("silu", "swish")
    text: "Family | None" = None
    outer: tuple[str, ...] = ()
    detector: Config = dataclasses.field(default_factory=dict)
    by_texts: str = ""
    replaced: str = ""

    def marked(self, names: frozenset[str]) -> bool:
        """Returns whether arrays with these names are of this family."""
        return any(re.search(self.marks, name) for name in names)

    def settings(self, config: Config) -> Config:
        """Returns the config of the image tower with every default filled in."""
        stored = config.get(self.section, config) if self.section else config
        kind: Any = config.get("model_type")
        own = self.by_type.get(kind, {})
        return {**self.defaults, **own, **(stored if isinstance(stored, Mapping) else {})}

    def reason_unused(self, name: str) -> str | None:
        """Returns why no encoder needs the array `name`; None if one may."""
        return next((why for what, why in self.unused.items() if re.fullmatch(what, name)), None)


FAMILIES = Kind(
    "family of transformers' models",
    __name__,
    attribute="FAMILY",
    form="package.module:FAMILY",
    accepts=lambda found: isinstance(found, Family),
)


def families() -> dict[str, Family]:
    """Returns every family of this package by its name."""
    return {name: FAMILIES.find(name) for name in FAMILIES.names()}


def by_model_type(kind: Any) -> Family | None:
    """Returns the family whose configs have this `model_type`."""
    return next((f for f in families().values() if kind in f.model_types), None)


def by_names(names: frozenset[str]) -> Family | None:
    """Returns the family that has arrays with these names; `vit`, the plainest, comes last."""
    return next((f for f in families().values() if f.marked(names)), None)


def projections(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """Yields the names of the projections of an attention layer that have a letter each."""
    for part in ("query", "key", "value"):
        yield f"{theirs}/{part[0]}_proj", f"{ours}/{part}"


MASK_TOKEN = {r".*embeddings\.mask_token": "of masked pre-training"}
