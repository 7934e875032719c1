"""DINOv2 (Oquab et al. 2023), with registers too (Darcet et al. 2024)."""

from collections.abc import Iterator

import numpy as np

from vit_jax.checkpoints.formats._hf import MASK_TOKEN, Family, State
from vit_jax.checkpoints.formats._hf.vit import attention
from vit_jax.checkpoints.weights import Renames


def _pairs() -> Iterator[tuple[str, str]]:
    yield "embeddings/cls_token", "backbone/cls"
    yield "embeddings/register_tokens", "backbone/registers"
    yield "embeddings/position_embeddings", "backbone/pos_embed"
    yield "embeddings/patch_embeddings/projection", "backbone/patch_embed"
    block, ours = "encoder/layer/{i}", "backbone/blocks_{i}"
    yield from attention(block, ours)
    for number in (1, 2):
        yield f"{block}/norm{number}", f"{ours}/norm{number}"
        yield f"{block}/layer_scale{number}/lambda1", f"{ours}/scale{number}"
        yield f"{block}/mlp/fc{number}", f"{ours}/mlp/dense{number}"
    for theirs, part in (("gate", "gate"), ("up", "dense1"), ("weights_out", "dense2")):
        yield f"{block}/mlp/{theirs}", f"{ours}/mlp/{part}"
    yield "layernorm", "backbone/norm"
    yield "classifier", "head"


def prepare(state: State) -> State:
    """Splits the joined first layer of SwiGLU, and leaves out what changes nothing.

    The gate comes first in that layer. Scales of ones, and zeros in the half of the classifier that
    reads the mean of the patches, are what exports write for models without them.
    """
    out = {}
    for name, array in state.items():
        if ".mlp.weights_in." in name and array.ndim and len(array) % 2 == 0:
            for part, half in zip(("gate", "up"), np.split(array, 2), strict=True):
                out[name.replace("weights_in", part)] = half
        else:
            out[name] = array
    scales = [name for name in out if name.endswith(".lambda1")]
    if all(np.all(out[name] == 1) for name in scales):
        out = {name: array for name, array in out.items() if name not in scales}
    kernel, norm = out.get("classifier.weight"), out.get("layernorm.weight")
    if kernel is not None and norm is not None and kernel.ndim == 2:
        width = norm.size
        if kernel.shape[1] == 2 * width and not np.any(kernel[:, width:]):
            out["classifier.weight"] = kernel[:, :width]
    return out


FAMILY = Family(
    model_types=("dinov2", "dinov2_with_registers"),
    marks=r"encoder\.layer\.0\.layer_scale1\.lambda1$",
    names=Renames(_pairs()),
    prefixes=("dinov2.", "dinov2_with_registers."),
    unused=MASK_TOKEN,
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 14,
    },
    by_type={"dinov2_with_registers": {"patch_size": 16}},
    prepare=prepare,
    interpolations={"dinov2_with_registers": "bicubic"},
    gated=("gelu", "silu", "swish"),  # The gate is SiLU, whatever its config says.
)
