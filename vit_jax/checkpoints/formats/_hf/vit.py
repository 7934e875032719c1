"""ViT, MAE, MSN, I-JEPA and DeiT, whose names differ by prefixes and by DeiT's second token."""

from collections.abc import Iterator

import numpy as np

from vit_jax.checkpoints.formats._hf import MASK_TOKEN, Family, State, projections
from vit_jax.checkpoints.weights import Renames

DISTILLATION, POSITIONS = "embeddings.distillation_token", "embeddings.position_embeddings"
TEACHER = "distillation_classifier.weight"


def attention(block: str, ours: str) -> Iterator[tuple[str, str]]:
    """Yields the names of the parts of an attention layer, which several families share."""
    for part in ("query", "key", "value"):
        yield f"{block}/attention/attention/{part}", f"{ours}/attn/{part}"
    yield f"{block}/attention/output/dense", f"{ours}/attn/out"


def pairs() -> Iterator[tuple[str, str]]:
    """Yields the names of the arrays of these models."""
    embeddings = "embeddings"
    yield f"{embeddings}/cls_token", "backbone/cls"
    yield f"{embeddings}/position_embeddings", "backbone/pos_embed"
    yield f"{embeddings}/patch_embeddings/projection", "backbone/patch_embed"
    yield f"{embeddings}/distillation_token", "backbone/distill"
    yield f"{embeddings}/register", "backbone/registers"
    block, ours = "encoder/layer/{i}", "backbone/blocks_{i}"
    yield f"{block}/layernorm_before", f"{ours}/norm1"
    yield f"{block}/layernorm_after", f"{ours}/norm2"
    yield from attention(block, ours)
    yield f"{block}/intermediate/dense", f"{ours}/mlp/dense1"
    yield f"{block}/output/dense", f"{ours}/mlp/dense2"
    # These are the names inside transformers from version 5 on; files keep the ones above.
    block = "layers/{i}"
    yield f"{block}/layernorm_before", f"{ours}/norm1"
    yield f"{block}/layernorm_after", f"{ours}/norm2"
    yield from projections(f"{block}/attention", f"{ours}/attn")
    yield f"{block}/attention/o_proj", f"{ours}/attn/out"
    for number in (1, 2):
        yield f"{block}/mlp/fc{number}", f"{ours}/mlp/dense{number}"
    yield "layernorm", "backbone/norm"
    yield "pooler/dense", "head/pre_logits"
    yield "classifier", "head"
    yield "cls_classifier", "head"
    yield "distillation_classifier", "head_distill"


def prepare(state: State) -> State:
    """Adds the position of DeiT's distillation token to the token.

    A model that has no head on that token sees it as a register.
    """
    token, table = state.get(DISTILLATION), state.get(POSITIONS)
    if token is None or table is None or table.ndim != 3 or token.shape != table[:, 1:2].shape:
        return state
    state = {**state, POSITIONS: np.delete(table, 1, axis=1)}
    name = DISTILLATION if TEACHER in state else "embeddings.register"
    del state[DISTILLATION]
    return {**state, name: token + table[:, 1:2]}


FAMILY = Family(
    model_types=("vit", "deit", "vit_mae", "vit_msn", "ijepa"),
    marks=r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$",
    names=Renames(pairs()),
    prefixes=("vit.", "deit.", "ijepa."),
    unused={**MASK_TOKEN, r"decoder\..*": "of masked pre-training"},
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    prepare=prepare,
    by_type={"vit_msn": {"layer_norm_eps": 1e-6}},
)
