"""BEiT (Bao et al. 2022) and Data2Vec-Vision (Baevski et al. 2022), whose positions are offsets."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.formats._hf import MASK_TOKEN, Config, Family
from vit_jax.checkpoints.formats._hf.vit import attention
from vit_jax.checkpoints.weights import Renames

BIAS = "relative_position_bias/relative_position_bias_table"


def _pairs() -> Iterator[tuple[str, str]]:
    yield "embeddings/cls_token", "backbone/cls"
    yield "embeddings/position_embeddings", "backbone/pos_embed"
    yield "embeddings/patch_embeddings/projection", "backbone/patch_embed"
    yield f"encoder/{BIAS}", "backbone/position_bias/table"
    block, ours = "encoder/layer/{i}", "backbone/blocks_{i}"
    yield f"{block}/layernorm_before", f"{ours}/norm1"
    yield f"{block}/layernorm_after", f"{ours}/norm2"
    yield f"{block}/attention/attention/{BIAS}", f"{ours}/attn/position_bias/table"
    yield from attention(block, ours)
    for number in (1, 2):
        yield f"{block}/lambda_{number}", f"{ours}/scale{number}"
    yield f"{block}/intermediate/dense", f"{ours}/mlp/dense1"
    yield f"{block}/output/dense", f"{ours}/mlp/dense2"
    yield "layernorm", "backbone/norm"
    yield "pooler/layernorm", "backbone/fc_norm"
    yield "classifier", "head"


def fields(config: Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the field of models that have no positions but, maybe, offsets."""
    del config
    return {} if "embeddings.position_embeddings" in state else {"position": "none"}


FAMILY = Family(
    model_types=("beit", "data2vec-vision"),
    marks=r"encoder\.layer\.0\.lambda_1$",
    names=Renames(_pairs()),
    prefixes=("beit.", "data2vec_vision."),
    unused={
        **MASK_TOKEN,
        r".*relative_position_index": "the numbers of the offsets, which follow from the grid",
        r"lm_head\..*": "of masked pre-training",
    },
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    fields=fields,
)
