"""CLIP (Radford et al. 2021)."""

from collections.abc import Iterator

from vit_jax.checkpoints.formats._hf import Family, _text
from vit_jax.checkpoints.weights import Renames


def pairs() -> Iterator[tuple[str, str]]:
    """Yields the names of the arrays of the image tower."""
    yield "embeddings/class_embedding", "backbone/cls"
    yield "embeddings/patch_embedding", "backbone/patch_embed"
    yield "embeddings/position_embedding/weight", "backbone/pos_embed"
    yield "pre_layrnorm", "backbone/pre_norm"  # The name has this spelling in the files.
    yield "pre_layernorm", "backbone/pre_norm"
    yield from _text.block_pairs("encoder/layers/{i}", "backbone/blocks_{i}")
    yield "post_layernorm", "backbone/norm"
    yield _text.VISUAL_PROJECTION, "head"
    yield "classifier", "head"


FAMILY = Family(
    model_types=("clip", "clip_vision_model"),
    marks=r"(^|\.)pre_layr?norm\.weight$",
    names=Renames(pairs()),
    prefixes=("vision_model.vision_model.", "vision_model."),
    unused={_text.OF_TEXT: "of the text tower", **_text.POSITION_IDS},
    section="vision_config",
    defaults={
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    },
    prepare=_text.with_projection_bias,
    text=_text.CLIP,
)
