"""YOLOS (Fang et al. 2021), a ViT with detection tokens, which have positions of their own."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.formats._hf import Config, Family, State, vit
from vit_jax.checkpoints.formats._hf._boxes import mlp_pairs, rows_first
from vit_jax.checkpoints.weights import Renames

TOKENS, POSITIONS = "embeddings.detection_tokens", "embeddings.position_embeddings"
MIDDLE = "encoder.mid_position_embeddings"
SCORE, BOX = "class_labels_classifier", "bbox_predictor"


def prepare(state: State) -> State:
    """Adds the positions of detection tokens to them, and gives every block its own positions.

    Tokens are in the order of this package: the class token, the detection tokens, the patches.
    transformers adds positions after every block but the last, which is before every block but the
    first.
    """
    state = rows_first(state, f"{BOX}.layers.2")
    tokens, table, middle = (state.get(name) for name in (TOKENS, POSITIONS, MIDDLE))
    if tokens is None or table is None or tokens.ndim != 3 or table.ndim != 3:
        return state
    count = tokens.shape[1]
    state = {**state, POSITIONS: table[:, :-count], TOKENS: tokens + table[:, -count:]}
    if middle is not None and middle.ndim == 4:
        del state[MIDDLE]
        parts = (middle[:, :, :1], middle[:, :, -count:], middle[:, :, 1:-count])
        ordered = np.concatenate(parts, axis=2)
        ordered = np.concatenate([np.zeros_like(ordered[:1]), ordered])
        state |= {f"encoder.layer.{i}.positions": table for i, table in enumerate(ordered)}
    return state


def fields(config: Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of a model of which the detection tokens alone are read."""
    del config, state
    return {"pooling": "none", "class_token": True}


FAMILY = Family(
    model_types=("yolos",),
    marks=r"(^|\.)embeddings\.detection_tokens$",
    names=Renames(
        [
            (TOKENS.replace(".", "/"), "backbone/registers"),
            ("encoder/layer/{i}/positions", "backbone/blocks_{i}/positions"),
            *mlp_pairs(f"{SCORE}/layers/", "decoder/score"),
            *mlp_pairs(f"{BOX}/layers/", "decoder/box"),
            *vit.pairs(),
        ]
    ),
    prefixes=("vit.",),
    unused={r"(vit\.)?pooler\..*": "of a pooling that no detection reads"},
    defaults={**vit.FAMILY.defaults, "image_size": [512, 864]},
    prepare=prepare,
    fields=fields,
    detector={"head": "tokens", "activation": "relu", "prior": 0.0},
)
