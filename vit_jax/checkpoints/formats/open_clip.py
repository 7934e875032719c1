"""open_clip's own files: the image tower of a CLIP, which may be a model of timm.

A folder has `open_clip_config.json` beside the weights. Folders of the hub often hold the same
weights for transformers as well, with a `config.json`; those are read by the format `hf`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints import array_files
from vit_jax.checkpoints.formats import Format, hf, timm
from vit_jax.checkpoints.formats._hf import Config, Family, State
from vit_jax.checkpoints.formats._hf.siglip import split_in_proj
from vit_jax.checkpoints.input_spec import OPEN_CLIP
from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import Renames, Weights
from vit_jax.errors import UserError
from vit_jax.models import timm_names
from vit_jax.plugins import check_known

WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
CONV = "visual.conv1.weight"
TRUNK, PROJECTION = "visual.trunk.", "visual.head.proj"

LN_POOLED = "ln_pooled"
"""A name of this module for open_clip's `ln_post` where that norm comes after the pooling."""

POOLINGS = {"tok": "token", "avg": "mean"}

KNOWN = frozenset(
    (
        *("width", "head_width", "image_size", "patch_size", "pool_type", "final_ln_after_pool"),
        *("act_kwargs", "norm_kwargs"),
        # The arrays show these, or they change training alone.
        *("layers", "mlp_ratio", "ls_init_value", "no_ln_pre", "pos_embed_type"),
        *("patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"),
    )
)
"""Keys of the image tower's config that are read, or may be passed over."""


def _pairs() -> Iterator[tuple[str, str]]:
    yield "class_embedding", "backbone/cls"
    yield "conv1", "backbone/patch_embed"
    yield "positional_embedding", "backbone/pos_embed"
    yield "ln_pre", "backbone/pre_norm"
    block, ours = "transformer/resblocks/{i}", "backbone/blocks_{i}"
    for part in ("query", "key", "value"):
        yield f"{block}/attn/{part}", f"{ours}/attn/{part}"
    yield f"{block}/attn/out_proj", f"{ours}/attn/out"
    for number, dense in ((1, "c_fc"), (2, "c_proj")):
        yield f"{block}/ln_{number}", f"{ours}/norm{number}"
        yield f"{block}/ls_{number}/gamma", f"{ours}/scale{number}"
        yield f"{block}/mlp/{dense}", f"{ours}/mlp/dense{number}"
    yield "ln_post", "backbone/norm"
    yield LN_POOLED, "backbone/fc_norm"
    yield "projection", "head"


def prepare(state: State) -> State:
    """Splits joined projections, and makes the one into the space of texts the head."""
    state = split_in_proj(state)
    kernel = state.pop("proj", None)
    if kernel is None or kernel.ndim != 2:
        return state
    zeros = np.zeros(kernel.shape[1], np.float32)
    return {**state, "projection.weight": kernel.T, "projection.bias": zeros}


def fields(config: Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of the pooling, which CLIPA has changed (Li et al. 2023)."""
    del state
    found: dict[str, Any] = {"pooling": POOLINGS[config["pool_type"]], "class_token": True}
    return found | ({"last_norm": False, "fc_norm": True} if config["final_ln_after_pool"] else {})


FAMILY = Family(
    label="open_clip",
    model_types=("CLIP",),
    marks=r"^visual\.conv1\.weight$",
    names=Renames(_pairs()),
    prefixes=("visual.",),
    unused={
        r"(transformer|text|token_embedding|ln_final)\..*": "of the text tower",
        r"positional_embedding|text_projection|attn_mask|logit_(scale|bias)": "of the text tower",
        r"input_resolution|context_length|vocab_size": "a number of the file's own code",
    },
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "pool_type": "tok",
        "final_ln_after_pool": False,
    },
    prepare=prepare,
    fields=fields,
    interpolation="bicubic",
)


def matches(source: Source) -> bool:
    """Returns whether a file has open_clip's names, or a folder open_clip's config."""
    return CONV in source.names or (source.has(OPEN_CLIP) and source.has(*WEIGHTS))


def read(source: Source) -> Weights:
    """Returns the weights of the image tower.

    Raises:
      UserError: the image tower is a ResNet, or a model of timm that is none of this package.
    """
    if source.folder is None:
        return hf.from_state(source.arrays(), FAMILY)
    place = source.folder / OPEN_CLIP
    state = array_files.read_arrays(
        source.folder / next(name for name in WEIGHTS if source.has(name))
    )
    config = source.json(OPEN_CLIP)
    if any(name.startswith(TRUNK) for name in state):
        return _of_timm(state, _part(_part(config, "model_cfg"), "vision_cfg"))
    if CONV not in state or "visual.layer1.0.conv1.weight" in state:
        raise UserError(f"{source.folder}: its image tower is no ViT of open_clip's own")
    settings = _settings(config)
    if settings["final_ln_after_pool"]:
        state = {
            name.replace("visual.ln_post.", f"visual.{LN_POOLED}."): state[name] for name in state
        }
    return hf.from_state(state, FAMILY, settings, place)


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
    unknown = [key for key, value in tower.items() if value and key not in KNOWN]
    if unknown:
        raise UserError(f"{OPEN_CLIP}: {unknown[0]}={tower[unknown[0]]!r:.100} is not read")
    width, head_width = tower.get("width", 768), tower.get("head_width", 64)
    if type(width) is not int or type(head_width) is not int or not 0 < head_width <= width:
        raise UserError(f"{OPEN_CLIP}: width={width!r:.100} and head_width={head_width!r:.100}")
    pooling = tower.get("pool_type", "tok")
    check_known(pooling, POOLINGS, f"{OPEN_CLIP}: pool_type={pooling!r:.100}", "pooling")
    act, norm = (_part(tower, f"{layer}_kwargs") for layer in ("act", "norm"))
    if whole.get("quick_gelu"):
        activation = "quick_gelu"
    else:
        activation = "gelu_new" if act.get("approximate") == "tanh" else "gelu"
    return {
        **{key: tower[key] for key in ("image_size", "patch_size") if key in tower},
        "model_type": "CLIP",
        "num_attention_heads": width // head_width,
        "hidden_act": activation,
        "layer_norm_eps": norm.get("eps", 1e-5),
        "pool_type": pooling,
        "final_ln_after_pool": bool(tower.get("final_ln_after_pool")),
    }


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns a section of a config, {} if there is none."""
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


FORMAT = Format(label="open_clip", matches=matches, read=read)
