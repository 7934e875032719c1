"""AIMv2 (Fini et al. 2024), which has RMS norms and, in its blocks, no biases."""

from collections.abc import Iterator

import numpy as np

from vit_jax.checkpoints.formats._hf import Family, State
from vit_jax.checkpoints.weights import Renames


def _pairs() -> Iterator[tuple[str, str]]:
    yield "embeddings/patch_embed", "backbone/patch_embed"
    yield "embeddings/rms_norm", "backbone/embed_norm"
    yield "embeddings/position_embedding/weight", "backbone/pos_embed"
    block, ours = "encoder/layers/{i}", "backbone/blocks_{i}"
    for part in ("query", "key", "value"):
        yield f"{block}/attention/{part[0]}_proj", f"{ours}/attn/{part}"
    yield f"{block}/attention/out_proj", f"{ours}/attn/out"
    for number in (1, 2):
        yield f"{block}/rms_norm{number}", f"{ours}/norm{number}"
    for theirs, part in (("gate", "gate"), ("up", "dense1"), ("down", "dense2")):
        yield f"{block}/ffn/{theirs}_proj", f"{ours}/mlp/{part}"
    yield "rms_norm", "backbone/norm"
    pool = "backbone/map_head"
    yield "head/cls_token", f"{pool}/probe"
    for part in ("query", "key", "value"):
        yield f"head/{part[0]}_proj", f"{pool}/attn/{part}"
    yield "head/output_proj", f"{pool}/attn/out"


def prepare(state: State) -> State:
    """Gives the attention pooling the layers that it leaves out, such that they change nothing.

    Its probe is a query as it is, and its keys and values have no biases.
    """
    probe = state.get("head.cls_token")
    if probe is None:
        return state
    width = probe.shape[-1]
    zeros = {f"head.{part}_proj.bias": np.zeros(width, np.float32) for part in ("q", "k", "v")}
    return {"head.q_proj.weight": np.eye(width, dtype=np.float32), **zeros, **state}


FAMILY = Family(
    model_types=("aimv2", "aimv2_vision_model"),
    marks=r"(^|\.)embeddings\.rms_norm\.weight$",
    names=Renames(_pairs()),
    prefixes=("vision_model.",),
    unused={r"text_model\..*|logit_scale|(text|visual)_projection\..*": "of the text tower"},
    section="vision_config",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "num_attention_heads": 8,
        "image_size": 224,
        "patch_size": 14,
    },
    prepare=prepare,
)
