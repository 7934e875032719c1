"""Hugging Face transformers: directories of the models in `_hf`, and state dicts of them."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints import array_files, files
from vit_jax.checkpoints.formats import Format, ImageSize, _hf_export, _hf_towers, _torch_layout
from vit_jax.checkpoints.formats._hf import (
    FAMILIES,
    Family,
    _text,
    by_model_type,
    by_names,
    families,
)
from vit_jax.checkpoints.source import CONFIG, Source
from vit_jax.checkpoints.weights import CLS, DECODER, POSITIONS, Weights, add, join_towers
from vit_jax.errors import UserError
from vit_jax.plugins import check_known
from vit_jax.types import Params

SINGLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

MAX_SIDE = 1 << 20
"""Pixels of the largest side of an image or a patch that a config may name."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
"""The field `activation` for each `hidden_act` of a config."""

VIT = FAMILIES.find("vit")


def matches(source: Source) -> bool:
    """Returns whether a file has names of a family, or a folder has such a model."""
    in_file = by_names(source.names) is not None
    is_folder = source.has(CONFIG) and source.has(*SINGLE, *SHARDED)
    return in_file or (is_folder and "architecture" not in source.config)


def read(source: Source) -> Weights:
    """Returns the weights of a file, or of a folder, in one file or several, with its config.

    The config of a file lies beside it. Without one the family follows from the names, and the
    number of heads is the model's. Of an image-text model these are the weights of the wanted
    tower, or of both.

    Raises:
      UserError: another architecture, a broken file, or shards outside the folder.
    """
    if source.folder is None:
        family, state = by_names(source.names) or VIT, source.arrays()
        described = _describes(source.config, family, state)
        place = (source.beside or epath.Path()) / CONFIG
        return of_tower(source.tower, state, family, source.config if described else None, place)
    place, kind = source.folder / CONFIG, source.config.get("model_type")
    known = [name for family in families().values() for name in family.model_types]
    check_known(kind, known, f"{place}: model_type={str(kind)!r:.100}", "model that is read")
    state = _state_of(source.folder)
    found = by_model_type(kind)
    assert found is not None
    return of_tower(source.tower, state, found, source.config, place)


def _describes(config: Mapping[str, Any], family: Family, state: Mapping[str, np.ndarray]) -> bool:
    """Returns whether a config beside a file is that of its model: of its family and its width."""
    if by_model_type(config.get("model_type")) is not family:
        return False
    width = family.settings(config).get("hidden_size")
    for name, array in state.items():
        inner = _without(family.prefixes, _without(family.outer, name)).replace(".", "/")
        if family.names.to_ours(inner) == "backbone/patch_embed/weight":
            return width in (None, array.shape[0])
    return True


def of_tower(
    tower: str,
    state: Mapping[str, np.ndarray],
    family: Family,
    config: Mapping[str, Any] | None = None,
    place: epath.PathLike = CONFIG,
) -> Weights:
    """Returns the weights of one tower, or of both towers where the state dict has both.

    tower: see `Source`. The image tower is also the answer where there is no other.
    """
    state = {_without(family.outer, name): array for name, array in state.items()}
    texts = {name: array for name, array in state.items() if _text.is_of_text(name)}
    both = tower == "both" and bool(texts)
    unread = _named(state, family.by_texts)
    if unread:
        unread = [*_named(state, family.replaced), *(() if both else unread)]
    ignored = tuple(f"{name}: of {OTHER_HEAD[both]}" for name in unread)
    state = {name: array for name, array in state.items() if name not in unread}
    if tower == "image" or not texts or family.text is None:
        image = from_state(state, family, config, place)
        return dataclasses.replace(image, ignored=(*image.ignored, *ignored))
    text = from_state(texts, family.text, config, place)
    if tower == "text":
        return text
    between = _text.between(config or {}, state, family.text.defaults.get("max_logit_scale"))
    images = {name: x for name, x in state.items() if name not in {*texts, *_text.BETWEEN}}
    image = from_state(images, family, config, place)
    image = dataclasses.replace(image, ignored=(*image.ignored, *ignored))
    return join_towers(image, text, between)


OTHER_HEAD = {True: "matching whole images with texts", False: "detection"}
"""The reason to leave out arrays of a detector, by whether both its towers are read."""


def _named(state: Mapping[str, np.ndarray], pattern: str) -> list[str]:
    return [name for name in state if pattern and re.fullmatch(pattern, name)]


def _without(prefixes: Sequence[str], name: str) -> str:
    return name.removeprefix(next((p for p in prefixes if name.startswith(p)), ""))


def _state_of(path: epath.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a folder. One that several files hold is that of the listed file."""
    for name in SINGLE:
        if (path / name).exists():
            return array_files.read_arrays(path / name)
    index = next(path / name for name in SHARDED if (path / name).exists())
    shards = files.read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} has no weight_map")
    for name in shards.values():
        if not isinstance(name, str) or PurePosixPath(name).name != name:
            raise UserError(f"{index} names {name!r}, which is no file of its directory")
    state: dict[str, np.ndarray] = {}
    for file in sorted(set(shards.values())):
        for name, array in array_files.read_arrays(path / file).items():
            if shards.get(name, file) == file:
                add(state, name, array, f"{path / file}: {name}")
    return state


def from_state(
    state: Mapping[str, np.ndarray],
    family: Family = VIT,
    config: Mapping[str, Any] | None = None,
    place: epath.PathLike = CONFIG,
) -> Weights:
    """Returns the weights of a state dict. place: the file that the config is from."""
    mine, ignored = _of_family(state, family)
    mine = family.prepare(mine)
    arrays, unknown = _torch_layout.from_state(mine, family.names)
    arrays = {name: _as_tokens(name, array) for name, array in arrays.items()}
    kind: Any = (config or {}).get("model_type")
    settings, grid = family.settings(config or {}), None
    notes: tuple[str, ...] = ()
    gated = ACTIVATIONS if config is None else family.gated
    computed = _computation(settings, arrays, place, gated)
    fields = {**computed, **family.fields(settings, mine)}
    if config is None:
        notes = (_assumed(family, fields),)
    else:
        for key, part in (("num_attention_heads", "blocks_"), ("attn_pooler_heads", "map_head")):
            heads = _number(settings, key if key in settings else "num_attention_heads", place)
            arrays |= _split_heads({n: arrays[n] for n in arrays if part in n}, heads, place)
        grid = _grid(settings, place)
    return Weights(
        arrays=arrays,
        format=f"{family.label} {kind or 'state dict'}",
        class_row=CLS in arrays,
        grid=grid,
        ignored=ignored,
        unknown=tuple(unknown),
        notes=notes,
        interpolation=family.interpolations.get(kind, family.interpolation),
        bias_interpolation="torch_bilinear",
        fields=fields,
        detector=family.detector if any(n.startswith(DECODER) for n in arrays) else {},
    )


def _of_family(
    state: Mapping[str, np.ndarray], family: Family
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the arrays of the encoder without prefixes, and what else there is with reasons."""
    mine: dict[str, np.ndarray] = {}
    ignored = []
    for name, array in state.items():
        reason = family.reason_unused(name)
        if reason:
            ignored.append(f"{name}: {reason}")
        else:
            add(mine, _without(family.prefixes, name), array, name)
    return mine, tuple(ignored)


def _as_tokens(name: str, array: np.ndarray) -> np.ndarray:
    """Returns tokens and tables of positions, which may be vectors or matrices, with three axes."""
    if name not in (CLS, POSITIONS) or array.ndim > 2:
        return array
    return array.reshape(1, -1, array.shape[-1]) if array.ndim else array


def _grid(settings: Mapping[str, Any], place: epath.PathLike) -> tuple[int, int] | None:
    """Returns (rows, columns) of the positions; None for a square of patches, and for texts."""
    if "num_patches" in settings or "image_size" not in settings:
        return None
    height, width = _sides(settings, "image_size", place)
    patch_height, patch_width = _sides(settings, "patch_size", place)
    return height // patch_height, width // patch_width


def _number(config: Mapping[str, Any], key: str, place: epath.PathLike) -> int:
    """Returns a whole number of a config, which says nothing of how large it may be."""
    value = config.get(key)
    if type(value) is not int or not 0 < value <= MAX_SIDE:
        raise UserError(f"{place}: {key}={value!r:.100} is no whole number from 1 to {MAX_SIDE}")
    return value


def _sides(config: Mapping[str, Any], key: str, place: epath.PathLike) -> tuple[int, int]:
    """Returns (height, width) of a config's size, which is one number or two."""
    value = config.get(key)
    if isinstance(value, list) and len(value) == 2:
        height, width = (_number({key: side}, key, place) for side in value)
        return height, width
    return (_number(config, key, place),) * 2


def _split_heads(
    arrays: Mapping[str, np.ndarray], heads: int, place: epath.PathLike
) -> dict[str, np.ndarray]:
    out = {}
    for name, array in arrays.items():
        shape: tuple[int, ...] = array.shape
        layer = name.rpartition("/attn/")[2]
        if layer == "out/kernel":
            shape = (heads, -1, shape[-1])
        elif layer.partition("/")[0] in ("query", "key", "value"):
            shape = (*shape[:-1], heads, -1)
        try:
            out[name] = array.reshape(shape)
        except ValueError as error:
            raise UserError(
                f"{place}: num_attention_heads={heads} does not fit {name}, which is"
                f" {list(array.shape)}"
            ) from error
    return out


def _computation(
    settings: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    place: epath.PathLike,
    gated: Iterable[str],
) -> dict[str, Any]:
    """Returns the fields of what blocks compute and arrays do not show."""
    key = next(name for name in ("layer_norm_eps", "rms_norm_eps") if name in settings)
    epsilon, activation = settings[key], settings["hidden_act"]
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise UserError(f"{place}: {key}={epsilon!r:.100} is no number between 0 and 1")
    fields = {"norm_epsilon": epsilon}
    is_gated = any("/mlp/gate/" in name for name in arrays)
    if is_gated:
        check_known(activation, gated, f"{place}: hidden_act={activation!r:.100}", "gate")
        return fields
    check_known(activation, ACTIVATIONS, f"{place}: hidden_act={activation!r:.100}", "activation")
    return {**fields, "activation": ACTIVATIONS[activation]}


def _assumed(family: Family, fields: Mapping[str, Any]) -> str:
    """Returns a line about what is assumed where there is no config."""
    listed = ", ".join(f"{key}={value!r}" for key, value in sorted(fields.items()))
    return (
        f"without its config.json, it is taken for a {family.model_types[0]} with {listed}; fields"
        " that you write replace these"
    )


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a folder of one tower, or of both; see `Format.write`."""
    target = _hf_export if models.text_tower_of(model) is None else _hf_towers
    return target.write(path, params, model, image_size)


FORMAT = Format(
    label="Hugging Face transformers",
    matches=matches,
    read=read,
    write=write,
    expresses=_hf_export.TARGETS[0].expresses,
    alternatives=tuple(
        target.expresses for target in (*_hf_export.TARGETS[1:], *_hf_towers.TWO_TARGETS)
    ),
)
