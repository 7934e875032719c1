"""Folders for open_clip: its config, and the arrays of its own towers of images and of texts."""

import json
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints import files
from vit_jax.checkpoints.formats import ImageSize, _timm_export, _torch_layout
from vit_jax.checkpoints.formats import _positions as positions
from vit_jax.checkpoints.formats._hf import State
from vit_jax.checkpoints.formats._hf._text import BETWEEN
from vit_jax.checkpoints.formats._open_clip import (
    FAMILY,
    LN_POOLED,
    POOLINGS,
    PROJECTED,
    TEXT,
    TEXT_POOLINGS,
    TRUNK,
)
from vit_jax.checkpoints.formats._timm_export import ratio
from vit_jax.checkpoints.input_spec import OPEN_CLIP
from vit_jax.checkpoints.weights import PATCHES, Arrays, from_params, split_towers
from vit_jax.errors import UserError
from vit_jax.types import Params

OF_TEXTS = frozenset(
    {"a text tower", "end pooling of texts", "last pooling of texts", "first pooling of texts"}
    | {"a causal mask", "an end token of texts", "the sigmoid loss's bias"}
    | {"another norm epsilon", "exact GELU", "quick GELU"}
)
EXPRESSES = OF_TEXTS | frozenset(
    {"a ViT", "class token", "mean pooling", "an unread class token"}
    | {"no bias of patches", "a norm before the blocks", "a norm after pooling", "no last norm"}
    | {"LayerScale", "sin-cos positions"}
)
OF_TIMM = tuple(OF_TEXTS | target.expresses for target in _timm_export.TARGETS)
"""The traits of models whose image tower is one of timm."""


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a folder of both towers; see `Format.write`.

    Raises:
      UserError: open_clip's towers compute something else.
    """
    if not isinstance(model, models.TwoTowers):
        raise UserError(
            "open_clip has no place for an image tower alone; write --to=hf, timm or orbax"
        )
    text: Any = model.text
    arrays = from_params(params, model)
    towers = split_towers(arrays)
    vision, images = _image_tower(towers["image"], model, image_size)
    is_custom = (
        "timm_model_name" in vision
        or bool(np.any(towers["text"]["head/bias"]))
        or not (text.causal and text.pooling == "end")
    )
    described = {
        "embed_dim": model.dim,
        **({"quick_gelu": True} if text.activation == "quick_gelu" else {}),
        **({"custom_text": True} if is_custom else {}),
        **({"init_logit_bias": model.bias_init} if model.bias_init is not None else {}),
        "vision_cfg": vision,
        "text_cfg": _text_config(towers["text"], text),
    }
    state = images | _text_state(towers["text"], is_custom)
    state |= {
        theirs: arrays[ours].reshape(()) for theirs, ours in BETWEEN.items() if ours in arrays
    }
    config = {"model_cfg": described, "preprocess_cfg": {}}
    contents = {
        OPEN_CLIP: (json.dumps(config, indent=2) + "\n").encode(),
        "open_clip_model.safetensors": files.safetensors_bytes(state),
    }
    files.write_directory(path, contents)
    place = os.path.abspath(path)
    return (
        f"wrote {os.fspath(path)} for open_clip, which normalizes images as OpenAI's CLIP does"
        f" unless preprocess_cfg in {OPEN_CLIP} names another mean and std, and takes OpenAI's"
        " tokenizer. For another one, copy its files into the folder, and write hf_tokenizer_name"
        f" and, if its texts are cleaned, tokenizer_kwargs to text_cfg in {OPEN_CLIP}\n"
        f"open_clip: model = open_clip.create_model({'local-dir:' + place!r})"
    )


def _image_tower(
    arrays: Arrays, model: models.TwoTowers, image_size: ImageSize
) -> tuple[dict[str, Any], State]:
    """Returns the config and the arrays of the image tower: open_clip's own, or one of timm.

    Raises:
      UserError: neither computes the same.
    """
    image: Any = model.backbone
    misfit = _misfit(model)
    if not misfit:
        images, has_row = positions.stored(arrays, image, image_size, class_row=True)
        size = positions.image_size_of(images, image_size, has_row)
        return _vision_config(images, image, size), _image_state(images)
    found = _timm_export.named(arrays, image, image_size)
    if found is None:
        of_size = "" if image_size is None else f" with image_size={image_size}"
        raise UserError(
            f"open_clip has no place for {misfit} but in models that timm has by a name, of which"
            f" this is none{of_size}; write --to=orbax"
        )
    name, side, state = found
    config = {
        "image_size": side,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": _timm_export.POOLINGS[image.pooling],
        "timm_proj": None if model.project_image else "none",
    }
    return config, {f"{TRUNK}{theirs}": x for theirs, x in state.items()}


def _misfit(model: models.TwoTowers) -> str:
    """Returns what open_clip's own image tower lacks to compute the same; "" for nothing."""
    image: Any = model.backbone
    text: Any = model.text
    named = models.traits_of(image).all_named
    one_alone = (image.activation == "quick_gelu") != (text.activation == "quick_gelu")
    reasons = {
        min(named - EXPRESSES, default=""): bool(named - EXPRESSES),
        "an image tower without a class token": not image.class_token and image.pooling != "token",
        "a bias of patches": image.patch_bias,
        "two last norms of images, or none": image.last_norm == image.fc_norm,
        "an image tower without a projection": not model.project_image,
        "quick GELU in one tower alone": one_alone,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _vision_config(arrays: Arrays, image: Any, size: tuple[int, int]) -> dict[str, Any]:
    patch = arrays[PATCHES].shape[:2]
    pooling = next(theirs for theirs, ours in POOLINGS.items() if ours == image.pooling)
    return {
        "image_size": size[0] if len(set(size)) == 1 else list(size),
        "patch_size": patch[0] if len(set(patch)) == 1 else list(patch),
        "head_width": image.width // image.num_heads,
        **_sizes(arrays, image),
        "pool_type": pooling,
        **({} if image.pre_norm else {"no_ln_pre": True}),
        **({"final_ln_after_pool": True} if image.fc_norm else {}),
    }


def _text_config(arrays: Arrays, text: Any) -> dict[str, Any]:
    pooling = "eos" if text.end_token is not None else None
    pooling = pooling or next(a for a, b in TEXT_POOLINGS.items() if b == text.pooling)
    return {
        "context_length": arrays["backbone/pos_embed"].shape[1],
        "vocab_size": arrays["backbone/token_embed"].shape[0],
        "heads": text.num_heads,
        **_sizes(arrays, text),
        "pool_type": pooling,
        **({} if text.end_token is None else {"eos_id": text.end_token}),
        **({} if text.causal else {"no_causal_mask": True}),
        **({"proj_bias": True} if np.any(arrays["head/bias"]) else {}),
    }


def _sizes(arrays: Arrays, tower: Any) -> dict[str, Any]:
    """Returns the settings that both towers have."""
    mlp_dim = arrays["backbone/blocks_0/mlp/dense1/kernel"].shape[1]
    tanh = {"act_kwargs": {"approximate": "tanh"}} if tower.activation == "gelu_tanh" else {}
    scale = getattr(tower, "layer_scale", None)
    return {
        "width": tower.width,
        "layers": tower.depth,
        "mlp_ratio": ratio(mlp_dim, tower.width),
        "norm_kwargs": {"eps": tower.norm_epsilon},
        **tanh,
        **({} if scale is None else {"ls_init_value": scale}),
    }


def _image_state(arrays: Arrays) -> State:
    state = _joined(_torch_layout.to_state(arrays, FAMILY.names))
    if np.any(state.pop(f"{PROJECTED}.bias")):
        raise UserError(
            "open_clip has no place for a bias on the projection of images; write --to=orbax"
        )
    state["proj"] = state.pop(f"{PROJECTED}.weight").T
    state["class_embedding"] = state["class_embedding"].reshape(-1)
    state["positional_embedding"] = state["positional_embedding"][0]
    return {f"visual.{name.replace(LN_POOLED, 'ln_post')}": x for name, x in state.items()}


def _text_state(arrays: Arrays, is_custom: bool) -> State:
    """Returns the arrays of the text tower, below `text` where they are not those of CLIP."""
    state = _joined(_torch_layout.to_state(arrays, TEXT.names))
    kernel, bias = (state.pop(f"{PROJECTED}.{leaf}") for leaf in ("weight", "bias"))
    if np.any(bias):
        state |= {"text_projection.weight": kernel, "text_projection.bias": bias}
    else:
        state["text_projection"] = kernel.T
    state["positional_embedding"] = state["positional_embedding"][0]
    return {f"text.{name}" if is_custom else name: x for name, x in state.items()}


def _joined(state: Mapping[str, np.ndarray]) -> State:
    """Joins queries, keys and values; the inverse of `siglip.split_in_proj`."""
    out = {}
    for name, array in state.items():
        module, _, leaf = name.rpartition(".")
        parent, _, part = module.rpartition(".")
        if part == "query":
            parts = [state[f"{parent}.{one}.{leaf}"] for one in ("query", "key", "value")]
            out[f"{parent}.in_proj_{leaf}"] = np.concatenate(parts)
        elif part not in ("key", "value"):
            out[name] = array
    return out
