"""DINOv3 (Siméoni et al. 2025), whose positions are rotations."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.formats._hf import MASK_TOKEN, Config, Family, projections
from vit_jax.checkpoints.weights import Renames
from vit_jax.models.layers.positions import ROPE_BASE


def _pairs() -> Iterator[tuple[str, str]]:
    yield "embeddings/cls_token", "backbone/cls"
    yield "embeddings/register_tokens", "backbone/registers"
    yield "embeddings/patch_embeddings", "backbone/patch_embed"
    ours = "backbone/blocks_{i}"
    for block in ("layer/{i}", "model/layer/{i}"):
        yield from projections(f"{block}/attention", f"{ours}/attn")
        yield f"{block}/attention/o_proj", f"{ours}/attn/out"
        for number in (1, 2):
            yield f"{block}/norm{number}", f"{ours}/norm{number}"
            yield f"{block}/layer_scale{number}/lambda1", f"{ours}/scale{number}"
        for theirs, part in (("gate", "gate"), ("up", "dense1"), ("down", "dense2")):
            yield f"{block}/mlp/{theirs}_proj", f"{ours}/mlp/{part}"
    yield "norm", "backbone/norm"
    yield "classifier", "head"


def fields(config: Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of the rotary positions, which leave no array."""
    del state
    base = float(config["rope_theta"])
    return {"position": "rope_dinov3", "rope_base": None if base == ROPE_BASE else base}


FAMILY = Family(
    model_types=("dinov3_vit",),
    marks=r"layer\.0\.attention\.o_proj\.weight$",
    names=Renames(_pairs()),
    prefixes=("dinov3_vit.", "dinov3."),
    unused=MASK_TOKEN,
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 6,
        "image_size": 224,
        "patch_size": 16,
        "rope_theta": 100.0,
    },
    fields=fields,
)
