"""AIMv2 (Fini et al. 2024), which has RMS norms and, in its blocks, no biases.

Its image tower was also tuned to a text tower, which has the same blocks (AIMv2-LiT).
"""

from collections.abc import Iterator

import numpy as np

from vit_jax.checkpoints.formats._hf import Family, State, _text, projections
from vit_jax.checkpoints.weights import Renames


def _block_pairs() -> Iterator[tuple[str, str]]:
    block, ours = "encoder/layers/{i}", "backbone/blocks_{i}"
    yield from projections(f"{block}/attention", f"{ours}/attn")
    yield f"{block}/attention/out_proj", f"{ours}/attn/out"
    for number in (1, 2):
        yield f"{block}/rms_norm{number}", f"{ours}/norm{number}"
    for theirs, part in (("gate", "gate"), ("up", "dense1"), ("down", "dense2")):
        yield f"{block}/ffn/{theirs}_proj", f"{ours}/mlp/{part}"
    yield "rms_norm", "backbone/norm"


def _text_pairs() -> Iterator[tuple[str, str]]:
    yield from _text.embedding_pairs()
    yield from _block_pairs()


def _pairs() -> Iterator[tuple[str, str]]:
    yield "embeddings/patch_embed", "backbone/patch_embed"
    yield "embeddings/rms_norm", "backbone/embed_norm"
    yield "embeddings/position_embedding/weight", "backbone/pos_embed"
    yield from _block_pairs()
    yield _text.VISUAL_PROJECTION, "head"
    pool = "backbone/map_head"
    yield "head/cls_token", f"{pool}/probe"
    yield from projections("head", f"{pool}/attn")
    yield "head/output_proj", f"{pool}/attn/out"


def prepare(state: State) -> State:
    """Gives the attention pooling the layers that it leaves out, such that they change nothing.

    Its probe is a query as it is, and its keys and values have no biases.
    """
    state = _text.with_projection_bias(state)
    probe = state.get("head.cls_token")
    if probe is None:
        return state
    width = probe.shape[-1]
    zeros = {f"head.{part}_proj.bias": np.zeros(width, np.float32) for part in ("q", "k", "v")}
    return {"head.q_proj.weight": np.eye(width, dtype=np.float32), **zeros, **state}


def without_idle_layers(state: State) -> State:
    """Folds the layers of an attention pooling into those that it has; the inverse of `prepare`.

    A bias of keys adds the same to all logits of a query; one of values is added to each output.
    """
    probe = state.get("head.cls_token")
    if probe is None:
        return state
    query, key, value = (f"head.{part}_proj" for part in ("q", "k", "v"))
    out, matrix = "head.output_proj", state["head.q_proj.weight"]
    if not np.array_equal(matrix, np.eye(len(matrix))) or np.any(state[f"{query}.bias"]):
        state = {**state, "head.cls_token": probe @ matrix.T + state[f"{query}.bias"]}
    if np.any(state[f"{value}.bias"]):
        moved = state[f"{out}.weight"] @ state[f"{value}.bias"]
        state = {**state, f"{out}.bias": state[f"{out}.bias"] + moved}
    left_out = (f"{query}.weight", *(f"{layer}.bias" for layer in (query, key, value)))
    return {name: x for name, x in state.items() if name not in left_out}


TEXT = Family(
    label="AIMv2",
    model_types=("aimv2_text_model",),
    marks=r"",
    names=Renames(_text_pairs()),
    prefixes=("text_model.",),
    section="text_config",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "num_attention_heads": 6,
        "eos_token_id": 49407,
        "max_logit_scale": 100.0,
    },
    prepare=_text.with_projection_bias,
    fields=_text.causal_fields,
)

FAMILY = Family(
    model_types=("aimv2", "aimv2_vision_model"),
    marks=r"(^|\.)embeddings\.rms_norm\.weight$",
    names=Renames(_pairs()),
    prefixes=("vision_model.",),
    unused={_text.OF_TEXT: "of the text tower"},
    section="vision_config",
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "num_attention_heads": 8,
        "image_size": 224,
        "patch_size": 14,
    },
    prepare=prepare,
    text=TEXT,
)
