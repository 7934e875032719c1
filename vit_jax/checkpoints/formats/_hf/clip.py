"""CLIP (Radford et al. 2021), and OWL-ViT and OWLv2, which detect with CLIP's encoder."""

from collections.abc import Iterator

from vit_jax.checkpoints.formats._hf import Family, _text
from vit_jax.checkpoints.weights import Renames


def _pairs() -> Iterator[tuple[str, str]]:
    yield "embeddings/class_embedding", "backbone/cls"
    yield "embeddings/patch_embedding", "backbone/patch_embed"
    yield "embeddings/position_embedding/weight", "backbone/pos_embed"
    yield "pre_layrnorm", "backbone/pre_norm"  # The name has this spelling in the files.
    yield "pre_layernorm", "backbone/pre_norm"
    yield from _text.block_pairs("encoder/layers/{i}", "backbone/blocks_{i}")
    yield "post_layernorm", "backbone/norm"
    yield _text.VISUAL_PROJECTION, "head"
    yield "classifier", "head"


OF_DETECTION = "of detection"
OWLV2 = {"image_size": 768, "patch_size": 16}

FAMILY = Family(
    model_types=(
        *("clip", "clip_vision_model"),
        *("owlvit", "owlvit_vision_model", "owlv2", "owlv2_vision_model"),
    ),
    marks=r"(^|\.)pre_layr?norm\.weight$",
    names=Renames(_pairs()),
    prefixes=(
        *("vision_model.vision_model.", "vision_model."),
        *("owlvit.vision_model.", "owlv2.vision_model."),
    ),
    unused={
        r"(owlv(it|2)\.)?(text_model\..*|text_projection\..*|logit_scale)": "of the text tower",
        r"owlv(it|2)\.visual_projection\..*": OF_DETECTION,
        r"(class_head|box_head|objectness_head|layer_norm)\..*|box_bias": OF_DETECTION,
        **_text.POSITION_IDS,
    },
    section="vision_config",
    defaults={
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    },
    by_type={
        **{kind: {"image_size": 768} for kind in ("owlvit", "owlvit_vision_model")},
        **{kind: OWLV2 for kind in ("owlv2", "owlv2_vision_model")},
    },
    prepare=_text.with_projection_bias,
    text=_text.CLIP,
)
