"""OWL-ViT (Minderer et al. 2022) and OWLv2 (2023): CLIP's towers, and a head that detects."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.formats._hf import Config, State, _text, clip
from vit_jax.checkpoints.formats._hf._boxes import mlp_pairs, rows_first
from vit_jax.checkpoints.weights import Renames

OWLV2 = {"image_size": 768, "patch_size": 16}

DETECTION = r"(class_head|box_head|objectness_head|layer_norm)\..*"


def prepare(state: State) -> State:
    """Gives projections biases of zeros, and puts the rows of a box first."""
    return rows_first(_text.with_projection_bias(state), "box_head.dense2")


def at_the_highest(config: Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of a text tower whose end token is the highest number in a text."""
    del config, state
    return {"pooling": "end", "causal": True, "end_token": None}


FAMILY = dataclasses.replace(
    clip.FAMILY,
    model_types=("owlvit", "owlvit_vision_model", "owlv2", "owlv2_vision_model"),
    marks=r"^class_head\.logit_shift\.weight$",
    names=Renames(
        [
            ("layer_norm", "decoder/norm"),
            ("class_head/dense0", "decoder/embed"),
            ("class_head/logit_shift", "decoder/shift"),
            ("class_head/logit_scale", "decoder/scale"),
            *mlp_pairs("box_head/dense", "decoder/box"),
            *mlp_pairs("objectness_head/dense", "decoder/objectness"),
            *clip.pairs(),
        ]
    ),
    outer=("owlvit.", "owlv2."),
    unused={**clip.FAMILY.unused, r"box_bias": "the places of the patches"},
    by_type={
        **{kind: {"image_size": 768} for kind in ("owlvit", "owlvit_vision_model")},
        **{kind: OWLV2 for kind in ("owlv2", "owlv2_vision_model")},
    },
    prepare=prepare,
    text=dataclasses.replace(_text.CLIP, fields=at_the_highest),
    by_texts=DETECTION,
    replaced=r"visual_projection\..*|logit_scale",
)
