"""SigLIP (Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025), of fixed and of any grid."""

import math
from collections.abc import Iterator

import numpy as np

from vit_jax.checkpoints.formats._hf import Family, State, _text
from vit_jax.checkpoints.formats._hf._text import block_pairs
from vit_jax.checkpoints.weights import Renames

SIGLIP2 = ("siglip2", "siglip2_vision_model")
"""The models of any grid, whose positions are of a square of `num_patches`."""

PATCHES = "embeddings.patch_embedding.weight"


def _pairs() -> Iterator[tuple[str, str]]:
    yield "embeddings/patch_embedding", "backbone/patch_embed"
    yield "embeddings/position_embedding/weight", "backbone/pos_embed"
    yield from block_pairs("encoder/layers/{i}", "backbone/blocks_{i}")
    yield "post_layernorm", "backbone/norm"
    pool = "backbone/map_head"
    yield "head/probe", f"{pool}/probe"
    for part in ("query", "key", "value"):
        yield f"head/attention/{part}", f"{pool}/attn/{part}"
    yield "head/attention/out_proj", f"{pool}/attn/out"
    yield "head/layernorm", f"{pool}/norm"
    for number in (1, 2):
        yield f"head/mlp/fc{number}", f"{pool}/mlp/dense{number}"
    yield "classifier", "head"


def split_in_proj(state: State) -> State:
    """Splits the joined projections of PyTorch's own attention layer into three."""
    out = {}
    for name, array in state.items():
        module, _, leaf = name.rpartition(".in_proj_")
        if module and leaf in ("weight", "bias") and array.ndim and len(array) % 3 == 0:
            parts = zip(("query", "key", "value"), np.split(array, 3), strict=True)
            out.update({f"{module}.{part}.{leaf}": piece for part, piece in parts})
        else:
            out[name] = array
    return out


def prepare(state: State) -> State:
    """Splits the pooling's projections, and shapes a kernel of flattened patches as a convolution.

    A model with a classifier averages the patches and leaves the attention pooling unused.
    """
    state = split_in_proj(state)
    kernel = state.get(PATCHES)
    if kernel is not None and kernel.ndim == 2:
        side = math.isqrt(kernel.shape[1] // 3)
        patches = kernel.reshape(len(kernel), side, side, -1)
        state = {**state, PATCHES: patches.transpose(0, 3, 1, 2)}
    if "classifier.weight" in state:
        state = {name: x for name, x in state.items() if not name.startswith("head.")}
    return state


FAMILY = Family(
    model_types=("siglip", "siglip_vision_model", *SIGLIP2),
    marks=r"(^|\.)head\.attention\.in_proj_weight$",
    names=Renames(_pairs()),
    prefixes=("vision_model.vision_model.", "vision_model."),
    unused={_text.OF_TEXT: "of the text tower", **_text.POSITION_IDS},
    section="vision_config",
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    by_type={kind: {"num_patches": 256} for kind in SIGLIP2},
    prepare=prepare,
    interpolations=dict.fromkeys(SIGLIP2, "bilinear"),
    text=_text.SIGLIP,
)
