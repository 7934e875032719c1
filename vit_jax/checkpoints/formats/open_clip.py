"""open_clip's own files: the image tower of a CLIP, by the names that OpenAI's files have too.

A folder has `open_clip_config.json` beside the weights. Folders of the hub often hold the same
weights for transformers as well, with a `config.json`; those are read by the format `hf`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints import array_files
from vit_jax.checkpoints.formats import Format, hf
from vit_jax.checkpoints.formats._hf import Config, Family, State
from vit_jax.checkpoints.formats._hf.siglip import split_in_proj
from vit_jax.checkpoints.input_spec import OPEN_CLIP
from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import Renames, Weights
from vit_jax.errors import UserError

WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
CONV = "visual.conv1.weight"


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
    """Returns the fields of CLIP's encoder."""
    del config
    return {"pre_norm": "ln_pre.weight" in state, "patch_bias": "conv1.bias" in state}


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
    },
    prepare=prepare,
    fields=fields,
)


def matches(source: Source) -> bool:
    """Returns whether a file has open_clip's names, or a folder open_clip's config."""
    return CONV in source.names or (source.has(OPEN_CLIP) and source.has(*WEIGHTS))


def read(source: Source) -> Weights:
    """Returns the weights of the image tower.

    Raises:
      UserError: the image tower is a model of timm or a ResNet.
    """
    if source.folder is None:
        return hf.from_state(source.arrays(), FAMILY)
    place = source.folder / OPEN_CLIP
    state = array_files.read_arrays(
        source.folder / next(name for name in WEIGHTS if source.has(name))
    )
    if CONV not in state or "visual.layer1.0.conv1.weight" in state:
        raise UserError(f"{source.folder}: its image tower is no ViT of open_clip's own")
    return hf.from_state(state, FAMILY, _settings(source.json(OPEN_CLIP)), place)


def _settings(stored: Mapping[str, Any]) -> Config:
    """Returns the config of the image tower under transformers' keys."""
    whole = stored.get("model_cfg")
    whole = whole if isinstance(whole, Mapping) else {}
    tower = whole.get("vision_cfg")
    tower = tower if isinstance(tower, Mapping) else {}
    width, head_width = tower.get("width", 768), tower.get("head_width", 64)
    if type(width) is not int or type(head_width) is not int or not 0 < head_width <= width:
        raise UserError(f"{OPEN_CLIP}: width={width!r:.100} and head_width={head_width!r:.100}")
    known = {key: tower[key] for key in ("image_size", "patch_size") if key in tower}
    act = "quick_gelu" if whole.get("quick_gelu") else "gelu"
    heads = {"model_type": "CLIP", "num_attention_heads": width // head_width}
    return {**known, **heads, "hidden_act": act}


FORMAT = Format(label="open_clip", matches=matches, read=read)
