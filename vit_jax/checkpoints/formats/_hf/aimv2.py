"""AIMv2 (Fini et al. 2024), which has RMS norms and, in its blocks, no biases."""

from collections.abc import Iterator

from vit_jax.checkpoints.formats._hf import Family
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
)
