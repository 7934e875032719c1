"""open_clip's own files: the towers of a CLIP, of which that of images may be a model of timm.

A folder has `open_clip_config.json` beside the weights. Folders of the hub often hold the same
weights for transformers as well, with a `config.json`; those are read by the format `hf`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from vit_jax.checkpoints import array_files
from vit_jax.checkpoints.formats import Format, hf, timm
from vit_jax.checkpoints.formats._hf import Config, State
from vit_jax.checkpoints.formats._hf._text import BETWEEN, between
from vit_jax.checkpoints.formats._open_clip import (
    CONV,
    FAMILY,
    KNOWN,
    LN_POOLED,
    OF_TEXT,
    POOLER,
    POOLINGS,
    PROJECTION,
    TEXT,
    TEXT_KNOWN,
    TEXT_POOLINGS,
    TRUNK,
)
from vit_jax.checkpoints.formats._open_clip_export import EXPRESSES, OF_TIMM, write
from vit_jax.checkpoints.input_spec import OPEN_CLIP
from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import Weights, join_towers
from vit_jax.errors import UserError
from vit_jax.models import timm_names
from vit_jax.plugins import check_known

WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def matches(source: Source) -> bool:
    """Returns whether a file has open_clip's names, or a folder open_clip's config."""
    in_file = any(name.startswith((CONV, TRUNK)) for name in source.names)
    return in_file or (source.has(OPEN_CLIP) and source.has(*WEIGHTS))


def read(source: Source) -> Weights:
    """Returns the weights of the wanted tower, or of both.

    Raises:
      UserError: the image tower is a ResNet, or a model of timm that is none of this package, or
        the text tower is no transformer of open_clip's own.
    """
    config = source.json(OPEN_CLIP) or None
    if source.folder is None:
        state = source.arrays()
        config = config if _describes(config, state) else None
    else:
        name = next(name for name in WEIGHTS if source.has(name))
        state = array_files.read_arrays(source.folder / name)
    texts = {n: x for n, x in state.items() if re.fullmatch(OF_TEXT, n) and n not in BETWEEN}
    if source.tower == "image" or not texts:
        return _image_tower(source, state, config)
    settings = None if config is None else _text_settings(config)
    text = hf.from_state(texts, TEXT, settings, source.place)
    if source.tower == "text":
        return text
    images = {n: x for n, x in state.items() if n not in {*texts, *BETWEEN}}
    return join_towers(_image_tower(source, images, config), text, between({}, state, limit=None))


def _describes(config: Mapping[str, Any] | None, state: Mapping[str, np.ndarray]) -> bool:
    """Returns whether a config beside a file has the width of its image tower."""
    if config is None:
        return False
    kernel = state.get(CONV)
    if kernel is None:
        return True
    return _part(_part(config, "model_cfg"), "vision_cfg").get("width", 768) == kernel.shape[0]


def _image_tower(
    source: Source, state: Mapping[str, np.ndarray], config: Mapping[str, Any] | None
) -> Weights:
    of_timm = any(name.startswith(TRUNK) for name in state)
    if not of_timm and (CONV not in state or "visual.layer1.0.conv1.weight" in state):
        raise UserError(f"{source.path}: its image tower is no ViT of open_clip's own")
    if config is None and of_timm:
        raise UserError(f"{source.path}: its image tower is of timm; put {OPEN_CLIP} beside it")
    if config is None:
        return hf.from_state(_with_probe(state, FAMILY.defaults), FAMILY)
    if of_timm:
        return _of_timm(state, _part(_part(config, "model_cfg"), "vision_cfg"))
    assert source.beside is not None
    return own_tower(state, config, source.beside / OPEN_CLIP)


def own_tower(
    state: Mapping[str, np.ndarray], config: Mapping[str, Any], place: epath.PathLike
) -> Weights:
    """Returns the weights of an image tower of open_clip's own. place: the file of the config."""
    settings = _settings(config)
    state = _with_probe(state, settings)
    if settings["final_ln_after_pool"]:
        state = _norm_after_pooling(state)
    return hf.from_state(state, FAMILY, settings, place)


def _norm_after_pooling(state: Mapping[str, np.ndarray]) -> State:
    return {name.replace("visual.ln_post.", f"visual.{LN_POOLED}."): state[name] for name in state}


def _with_probe(state: Mapping[str, np.ndarray], settings: Config) -> Mapping[str, np.ndarray]:
    """Returns a state dict in which CoCa's pooling is that of this package (Yu et al. 2022).

    The image's vector is that of the first query, after a norm that sees nothing else; the others
    are for the text decoder. Both norms of the pooling are after the blocks, and after it.
    """
    queries = state.get(f"{POOLER}query")
    if queries is None or not len(queries):
        return state
    query = queries[0].astype(np.float64)
    centered = query - query.mean()
    normed = centered / np.sqrt(np.mean(centered**2) + settings["layer_norm_eps"])
    probe = normed * state[f"{POOLER}ln_q.weight"] + state[f"{POOLER}ln_q.bias"]
    left_out = (f"{POOLER}query", f"{POOLER}ln_q.weight", f"{POOLER}ln_q.bias")
    found = {name: x for name, x in state.items() if name not in left_out}
    for part in ("query", "key", "value"):
        # PyTorch keeps them apart where keys are of another width.
        apart = f"{POOLER}attn.{part[0]}_proj_weight"
        if apart in found:
            found[f"{POOLER}attn.{part}.weight"] = found.pop(apart)
    found[f"{POOLER}probe"] = probe.astype(np.float32).reshape(1, 1, -1)
    return _norm_after_pooling(found)


def _of_timm(state: Mapping[str, np.ndarray], tower: Mapping[str, Any]) -> Weights:
    """Returns the weights of an image tower that is a model of timm, with its projection.

    Raises:
      UserError: timm has no such model, or its output goes through other layers.
    """
    name, pooling = tower.get("timm_model_name"), tower.get("timm_pool", "avg")
    pooled = {"global_pool": pooling} if pooling else {}
    # A model with a projection is built as it is and told afterwards how to pool.
    has_projection = tower.get("timm_proj", "linear") == "linear"
    origin = timm_names.find(str(name), {} if has_projection else pooled)
    if origin is None:
        raise UserError(f"{OPEN_CLIP}: timm_model_name={name!r:.100} is no model of this package")
    if has_projection and pooling:
        known = timm_names.POOLINGS
        check_known(pooling, known, f"{OPEN_CLIP}: timm_pool={pooling!r:.100}", "pooling")
        fields = {**origin.fields, "pooling": known[pooling]}
        origin = dataclasses.replace(origin, fields=fields)
    trunk = {n.removeprefix(TRUNK): x for n, x in state.items() if n.startswith(TRUNK)}
    others = [n for n in state if n.startswith("visual.") and not n.startswith(TRUNK)]
    for key in [n for n in others if n.startswith(f"{PROJECTION}.")]:
        trunk[key.replace(PROJECTION, "head")] = state[key]
        others.remove(key)
    if others:
        raise UserError(f"{OPEN_CLIP}: this package has no {others[0]}")
    if "head.weight" in trunk and "head.bias" not in trunk:
        trunk["head.bias"] = np.zeros(len(trunk["head.weight"]), np.float32)
    ignored = tuple(f"{n}: of the text tower" for n in state if not n.startswith("visual."))
    weights = timm.from_state(trunk, origin)
    return dataclasses.replace(weights, format="open_clip", ignored=(*weights.ignored, *ignored))


def _settings(stored: Mapping[str, Any]) -> Config:
    """Returns the config of the image tower under transformers' keys.

    Raises:
      UserError: the tower has layers that are not known here, or a setting makes no sense.
    """
    whole = _part(stored, "model_cfg")
    tower = _part(whole, "vision_cfg")
    _check_keys(tower, KNOWN)
    pooler = tower.get("attentional_pool", False)
    if pooler not in (True, False) or (pooler and tower.get("pool_type", "tok") != "tok"):
        raise UserError(
            f"{OPEN_CLIP}: attentional_pool={pooler!r:.100} is read as True with pool_type='tok'"
        )
    width, head_width = tower.get("width", 768), tower.get("head_width", 64)
    if type(width) is not int or type(head_width) is not int or not 0 < head_width <= width:
        raise UserError(f"{OPEN_CLIP}: width={width!r:.100} and head_width={head_width!r:.100}")
    return {
        **{key: tower[key] for key in ("image_size", "patch_size") if key in tower},
        **_computation(whole, tower),
        "num_attention_heads": width // head_width,
        "pool_type": _pooling(tower, "tok", POOLINGS),
        # With attention pooling open_clip passes it over.
        "final_ln_after_pool": bool(tower.get("final_ln_after_pool")) and not pooler,
        "attn_pooler_heads": tower.get("attn_pooler_heads", 8),
    }


def _text_settings(stored: Mapping[str, Any]) -> Config:
    """Returns the config of the text tower as `_settings` does that of the image tower."""
    whole = _part(stored, "model_cfg")
    tower = _part(whole, "text_cfg")
    _check_keys(tower, TEXT_KNOWN)
    if tower.get("proj_type", "linear") != "linear":
        raise UserError(f"{OPEN_CLIP}: proj_type={tower['proj_type']!r:.100} is not read")
    end = tower.get("eos_id", 2)
    if type(end) is not int:
        raise UserError(f"{OPEN_CLIP}: eos_id={end!r:.100} is no number of a token")
    return {
        **_computation(whole, tower),
        "num_attention_heads": tower.get("heads", 8),
        "pool_type": _pooling(tower, "argmax", TEXT_POOLINGS),
        "eos_id": end,
        "no_causal_mask": bool(tower.get("no_causal_mask")),
    }


def _check_keys(tower: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = [key for key, value in tower.items() if value and key not in known]
    if unknown:
        raise UserError(f"{OPEN_CLIP}: {unknown[0]}={tower[unknown[0]]!r:.100} is not read")


def _pooling(tower: Mapping[str, Any], default: str, known: Mapping[str, str]) -> str:
    pooling = tower.get("pool_type", default)
    check_known(pooling, known, f"{OPEN_CLIP}: pool_type={pooling!r:.100}", "pooling")
    return pooling


def _computation(whole: Mapping[str, Any], tower: Mapping[str, Any]) -> Config:
    """Returns the settings of activations and norms, which both towers have."""
    act, norm = (_part(tower, f"{layer}_kwargs") for layer in ("act", "norm"))
    if whole.get("quick_gelu"):
        activation = "quick_gelu"
    else:
        activation = "gelu_new" if act.get("approximate") == "tanh" else "gelu"
    epsilon = norm.get("eps", 1e-5)
    return {"model_type": "CLIP", "hidden_act": activation, "layer_norm_eps": epsilon}


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns a section of a config, {} if there is none."""
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


FORMAT = Format(
    label="open_clip",
    matches=matches,
    read=read,
    write=write,
    expresses=EXPRESSES,
    alternatives=OF_TIMM,
    two_towers=True,
)
