"""The names of open_clip's own towers, and the fields that their configs tell."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.formats._hf import Config, Family, State
from vit_jax.checkpoints.formats._hf.siglip import split_in_proj
from vit_jax.checkpoints.weights import Renames

CONV = "visual.conv1.weight"
TRUNK, PROJECTION = "visual.trunk.", "visual.head.proj"

PROJECTED = "projection"
"""A name of this module for the layer into the common space of images and texts."""

LN_POOLED = "ln_pooled"
"""A name of this module for open_clip's `ln_post` where that norm comes after the pooling."""

POOLER = "visual.attn_pool."
"""The beginning of the names of CoCa's attention pooling."""

POOLINGS = {"tok": "token", "avg": "mean"}
TEXT_POOLINGS = {"argmax": "end", "eos": "end", "last": "last", "first": "first"}

OF_TEXT = (
    r"(transformer|text|text_decoder|token_embedding|ln_final)\..*|positional_embedding"
    r"|text_projection"
    r"|attn_mask|logit_(scale|bias)"
)
OWN_NUMBERS = {
    r"input_resolution|context_length|vocab_size": "a number of the file's own code",
    r"(text\.)?attn_mask": "the causal mask",
}

KNOWN = frozenset(
    (
        *("width", "head_width", "image_size", "patch_size", "pool_type", "final_ln_after_pool"),
        *("act_kwargs", "norm_kwargs", "attentional_pool", "attn_pooler_heads"),
        # The arrays show these, or they change training alone.
        *("layers", "mlp_ratio", "ls_init_value", "no_ln_pre", "pos_embed_type"),
        *("patch_dropout", "output_tokens", "attn_pooler_queries"),
    )
)
"""Keys of the image tower's config that are read, or may be passed over."""

TEXT_KNOWN = frozenset(
    (
        *("heads", "pool_type", "eos_id", "no_causal_mask", "act_kwargs", "norm_kwargs"),
        *("proj_type", "hf_tokenizer_name", "tokenizer_kwargs"),
        # The arrays show these, or they change training alone.
        *("context_length", "vocab_size", "width", "layers", "mlp_ratio", "ls_init_value"),
        *("proj_bias", "output_tokens", "pad_id"),
        # open_clip passes it over, too.
        "final_ln_after_pool",
    )
)
"""The same of the text tower's config."""


def _block_pairs() -> Iterator[tuple[str, str]]:
    block, ours = "transformer/resblocks/{i}", "backbone/blocks_{i}"
    for part in ("query", "key", "value"):
        yield f"{block}/attn/{part}", f"{ours}/attn/{part}"
    yield f"{block}/attn/out_proj", f"{ours}/attn/out"
    for number, dense in ((1, "c_fc"), (2, "c_proj")):
        yield f"{block}/ln_{number}", f"{ours}/norm{number}"
        yield f"{block}/ls_{number}/gamma", f"{ours}/scale{number}"
        yield f"{block}/mlp/{dense}", f"{ours}/mlp/dense{number}"


def _pairs() -> Iterator[tuple[str, str]]:
    yield "class_embedding", "backbone/cls"
    yield "conv1", "backbone/patch_embed"
    yield "positional_embedding", "backbone/pos_embed"
    yield "ln_pre", "backbone/pre_norm"
    yield from _block_pairs()
    yield "ln_post", "backbone/norm"
    yield LN_POOLED, "backbone/fc_norm"
    yield PROJECTED, "head"
    pool, ours = "attn_pool", "backbone/map_head"
    yield f"{pool}/ln_k", "backbone/norm"
    yield f"{pool}/probe", f"{ours}/probe"
    yield f"{pool}/attn/out_proj", f"{ours}/attn/out"
    for part in ("query", "key", "value"):
        yield f"{pool}/attn/{part}", f"{ours}/attn/{part}"


def _text_pairs() -> Iterator[tuple[str, str]]:
    yield "token_embedding/weight", "backbone/token_embed"
    yield "positional_embedding", "backbone/pos_embed"
    yield from _block_pairs()
    yield "ln_final", "backbone/norm"
    yield PROJECTED, "head"


def prepare(state: State) -> State:
    """Splits joined projections, and makes the one into the common space the head."""
    state = split_in_proj(state)
    for name in ("proj", "text_projection"):
        kernel = state.pop(name, None)
        if kernel is not None and kernel.ndim == 2:
            zeros = np.zeros(kernel.shape[1], np.float32)
            state |= {f"{PROJECTED}.weight": kernel.T, f"{PROJECTED}.bias": zeros}
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in state:
                state[f"{PROJECTED}.{leaf}"] = state.pop(f"{name}.{leaf}")
    return state


def fields(config: Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of the pooling, which CLIPA (Li et al. 2023) and CoCa have changed."""
    if "attn_pool.probe" in state:
        pooler = {"pooling": "map", "pool_prefix": True, "map_heads": config["attn_pooler_heads"]}
        return {**pooler, "class_token": True}
    found: dict[str, Any] = {"pooling": POOLINGS[config["pool_type"]], "class_token": True}
    return found | ({"last_norm": False, "fc_norm": True} if config["final_ln_after_pool"] else {})


FAMILY = Family(
    label="open_clip",
    model_types=("CLIP",),
    marks=r"^visual\.conv1\.weight$",
    names=Renames(_pairs()),
    prefixes=("visual.",),
    unused={OF_TEXT: "of the text tower", **OWN_NUMBERS},
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "pool_type": "tok",
        "final_ln_after_pool": False,
        "attn_pooler_heads": 8,
    },
    prepare=prepare,
    fields=fields,
    interpolation="bicubic",
)


def text_fields(config: Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of the mask and the pooling of the text tower."""
    del state
    end = config["eos_id"] if config["pool_type"] == "eos" else None
    pooling, causal = TEXT_POOLINGS[config["pool_type"]], not config["no_causal_mask"]
    return {"pooling": pooling, "end_token": end, "causal": causal}


TEXT = Family(
    label="open_clip",
    model_types=("CLIP",),
    marks=r"",
    names=Renames(_text_pairs()),
    prefixes=("text.",),
    unused=OWN_NUMBERS,
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 8,
        "pool_type": "argmax",
        "no_causal_mask": False,
    },
    prepare=prepare,
    fields=text_fields,
)
