"""The text towers beside the image towers of CLIP, SigLIP and AIMv2."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoints.formats._hf import Config, Family, State, projections
from vit_jax.checkpoints.weights import Renames
from vit_jax.errors import UserError

VISUAL_PROJECTION, TEXT_PROJECTION = "visual_projection", "text_projection"

BETWEEN = {"logit_scale": "log_scale", "logit_bias": "bias"}
"""The arrays outside both towers, and their names in this package."""

OF_TEXT = r"text_model\..*|text_projection\..*|logit_(scale|bias)"
"""A regular expression of the names that no image tower needs."""

OLD_END = 2
"""The end token in CLIP's first configs, which is wrong: transformers takes the highest number."""

POSITION_IDS = {
    r".*embeddings\.position_ids": "the numbers of the positions, which are their order"
}


def block_pairs(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """Yields the names of a block of CLIP and SigLIP, in towers of images and of texts."""
    yield from projections(f"{theirs}/self_attn", f"{ours}/attn")
    yield f"{theirs}/self_attn/out_proj", f"{ours}/attn/out"
    for number in (1, 2):
        yield f"{theirs}/layer_norm{number}", f"{ours}/norm{number}"
        yield f"{theirs}/mlp/fc{number}", f"{ours}/mlp/dense{number}"


def embedding_pairs() -> Iterator[tuple[str, str]]:
    """Yields the names of the tables of tokens and positions, and of the projection."""
    yield "embeddings/token_embedding/weight", "backbone/token_embed"
    yield "embeddings/position_embedding/weight", "backbone/pos_embed"
    yield TEXT_PROJECTION, "head"


def _pairs() -> Iterator[tuple[str, str]]:
    yield from embedding_pairs()
    yield from block_pairs("encoder/layers/{i}", "backbone/blocks_{i}")
    yield "final_layer_norm", "backbone/norm"
    yield "head", "head"


def with_projection_bias(state: State) -> State:
    """Gives the projections into the common space, which are heads here, biases of zeros."""
    zeros = {
        f"{name}.bias": np.zeros(len(state[f"{name}.weight"]), np.float32)
        for name in (VISUAL_PROJECTION, TEXT_PROJECTION)
        if f"{name}.weight" in state
    }
    return zeros | state


def is_of_text(name: str) -> bool:
    """Returns whether an array of one of these models is of its text tower."""
    return re.fullmatch(OF_TEXT, name) is not None and name not in BETWEEN


def between(
    config: Config, state: Mapping[str, np.ndarray], limit: float | None
) -> dict[str, np.ndarray]:
    """Returns the arrays outside both towers, under our names.

    limit: the highest scale of the logits where the config names none; None for no limit.
    """
    found = {ours: state[theirs].reshape(1) for theirs, ours in BETWEEN.items() if theirs in state}
    limit = config.get("max_logit_scale", limit)
    if "log_scale" in found and limit is not None:
        found["log_scale"] = np.minimum(found["log_scale"], np.float32(math.log(limit)))
    return found


def causal_fields(config: Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of a tower that reads the vector at the end token.

    Raises:
      UserError: the config names several end tokens, or none.
    """
    del state
    end = config.get("eos_token_id")
    if type(end) is not int:
        raise UserError(f"eos_token_id={end!r:.100} of the text tower is no number of a token")
    return {"pooling": "end", "causal": True, "end_token": None if end == OLD_END else end}


def _at_the_last(config: Config, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    del config, state
    return {"pooling": "last", "causal": False}


_SHARED: Mapping[str, Any] = {
    "marks": r"",
    "names": Renames(_pairs()),
    "prefixes": ("text_model.text_model.", "text_model."),
    "unused": POSITION_IDS,
    "section": "text_config",
}

CLIP = Family(
    label="CLIP",
    model_types=("clip_text_model",),
    **_SHARED,
    defaults={
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 8,
        "eos_token_id": 49407,
    },
    prepare=with_projection_bias,
    fields=causal_fields,
)

SIGLIP = Family(
    label="SigLIP",
    model_types=("siglip_text_model",),
    **_SHARED,
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 12,
    },
    fields=_at_the_last,
)
