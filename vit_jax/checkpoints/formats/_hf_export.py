"""Folders for Hugging Face transformers: the class for a model, its config and its arrays."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints import files
from vit_jax.checkpoints.formats import ImageSize, _torch_layout
from vit_jax.checkpoints.formats import _positions as positions
from vit_jax.checkpoints.formats._hf import Family, State, dinov2, dinov3, siglip, vit
from vit_jax.checkpoints.source import CONFIG
from vit_jax.checkpoints.weights import Arrays, from_params
from vit_jax.errors import UserError
from vit_jax.types import Params

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
"""The `hidden_act` of a config for each value of the field `activation`."""

_COMMON = frozenset({"a ViT", "another norm epsilon", *("exact GELU", "quick GELU", "SiLU")})
_TABLE = frozenset({"sin-cos positions", "no positions"})

_OF_DINOV2 = frozenset({"class token", "pooling of class token and mean", "LayerScale"})

Extra = Callable[[Any, Arrays], dict[str, Any]]


def _nothing(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    del backbone, arrays
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A class of transformers that models are written for.

    Attributes:
      family: the names of its arrays.
      model_type: the value in the config.
      expresses: the traits that it has a place for.
      bare, headed: the names of the class without and with a classifier; "" where there is none.
      call: arguments of the class without a classifier, after the path.
      prefix: that of the encoder's names; with a classifier alone unless `always`.
      config: returns further entries of the config.
      arrays: returns the arrays that the class has, from those of the model.
      state: returns the state dict that the class has, from one with the names of `family`.
    """

    family: Family
    model_type: str
    expresses: frozenset[str]
    bare: str
    headed: str = ""
    call: str = ""
    prefix: str = ""
    always: bool = False
    class_row: bool = True
    config: Extra = _nothing
    arrays: Callable[[Arrays], Arrays] = dict
    state: Callable[[State], State] = dict


def _plain(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    del backbone
    return {"intermediate_size": _mlp_dim(arrays), "qkv_bias": True}


def _mlp_dim(arrays: Arrays) -> int:
    return arrays["backbone/blocks_0/mlp/dense1/kernel"].shape[1]


def _of_dinov2(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    ratio, rest = divmod(_mlp_dim(arrays), backbone.width)
    if rest:
        raise UserError(
            f"hf has no place for an MLP of width {_mlp_dim(arrays)}, which is no multiple of"
            f" {backbone.width}, in a DINOv2; write --to=timm or orbax"
        )
    found = {"mlp_ratio": ratio, "qkv_bias": True, "use_swiglu_ffn": False}
    registers = {"num_register_tokens": backbone.num_registers} if backbone.num_registers else {}
    return found | registers


def _of_dinov3(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    return {
        "intermediate_size": _mlp_dim(arrays),
        "num_register_tokens": backbone.num_registers,
        "use_gated_mlp": backbone.mlp == "swiglu",
        "rope_theta": backbone.rope_base or 100.0,
        "key_bias": backbone.key_bias,
    }


def _also_mean(arrays: Arrays) -> Arrays:
    """Gives the classifier zeros for the patches' mean, which DINOv2's reads beside the token."""
    kernel = arrays.get("head/kernel")
    if kernel is None or len(kernel) != len(arrays["backbone/norm/scale"]):
        return arrays
    return {**arrays, "head/kernel": np.concatenate([kernel, np.zeros_like(kernel)])}


def _with_scales(arrays: Arrays) -> Arrays:
    """Gives every block a LayerScale of ones where the model has none."""
    scales: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.endswith("/norm1/scale") and "/blocks_" in name:
            block = name.removesuffix("/norm1/scale")
            scales |= {f"{block}/scale{i}": np.ones_like(array) for i in (1, 2)}
    return {**scales, **arrays}


def _joined(state: State) -> State:
    """Joins the projections of the attention pooling, and makes the positions a matrix."""
    out = dict(state)
    for leaf in ("weight", "bias"):
        names = [f"head.attention.{part}.{leaf}" for part in ("query", "key", "value")]
        out[f"head.attention.in_proj_{leaf}"] = np.concatenate([out.pop(name) for name in names])
    table = "embeddings.position_embedding.weight"
    return {**out, table: out[table][0]}


_DINOV2: dict[str, Any] = {
    "family": dinov2.FAMILY,
    "prefix": "dinov2.",
    "config": _of_dinov2,
    "arrays": lambda arrays: _also_mean(_with_scales(arrays)),
}

TARGETS = (
    Target(
        family=vit.FAMILY,
        model_type="vit",
        expresses=_COMMON | _TABLE | {"class token"},
        bare="ViTModel",
        headed="ViTForImageClassification",
        call=", add_pooling_layer=False",
        prefix="vit.",
        config=_plain,
    ),
    Target(
        model_type="dinov2",
        expresses=_COMMON | _TABLE | _OF_DINOV2,
        bare="Dinov2Model",
        headed="Dinov2ForImageClassification",
        **_DINOV2,
    ),
    Target(
        model_type="dinov2_with_registers",
        expresses=_COMMON | _TABLE | _OF_DINOV2 | {"registers"},
        bare="Dinov2WithRegistersModel",
        headed="Dinov2WithRegistersForImageClassification",
        **{**_DINOV2, "prefix": "dinov2_with_registers."},
    ),
    Target(
        family=dinov3.FAMILY,
        model_type="dinov3_vit",
        expresses=_COMMON
        | {"class token", "LayerScale", "registers", "SwiGLU", "no bias of keys"}
        | {"position='rope_dinov3'", "a base of rotary positions"},
        bare="DINOv3ViTModel",
        config=_of_dinov3,
        arrays=_with_scales,
    ),
    Target(
        family=siglip.FAMILY,
        model_type="siglip_vision_model",
        expresses=_COMMON | _TABLE | {"attention pooling"},
        bare="SiglipVisionModel",
        prefix="vision_model.",
        always=True,
        class_row=False,
        config=_plain,
        state=_joined,
    ),
)


def target_of(model: nn.Module) -> Target:
    """Returns the class that expresses a model, of which one has a place for all its traits.

    Raises:
      UserError: the class has no classifier, and the model has one.
    """
    traits = models.traits_of(model).all_named
    found = next(target for target in TARGETS if traits <= target.expresses)
    if models.has_head(model) and not found.headed:
        raise UserError(
            f"hf has no place for a classifier on {found.bare}; write --to=timm or orbax, or the"
            " backbone alone"
        )
    return found


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a folder with `config.json` and `model.safetensors`; see `Format.write`."""
    target, backbone = target_of(model), models.backbone_of(model)
    arrays = from_params(params, model)
    if backbone.position == "rope_dinov3":
        size = positions.check_size(arrays, image_size or 224, None)
    else:
        row = target.class_row
        arrays, class_row = positions.stored(arrays, backbone, image_size, class_row=row)
        size = positions.image_size_of(arrays, image_size, class_row)
    contents = {
        CONFIG: (json.dumps(_config(target, arrays, backbone, size), indent=2) + "\n").encode(),
        "model.safetensors": files.safetensors_bytes(_state(target, arrays)),
    }
    files.write_directory(path, contents)
    name, more = target.headed, ""
    if "head/kernel" not in arrays:
        name, more = target.bare, target.call
    call = f"model = transformers.{name}.from_pretrained({os.fspath(path)!r}{more})"
    return f"wrote {os.fspath(path)} for transformers\ntransformers: {call}"


def _state(target: Target, arrays: Arrays) -> State:
    state = target.state(_torch_layout.to_state(target.arrays(arrays), target.family.names))
    prefix = target.prefix if target.always or "head/kernel" in arrays else ""
    return {
        name if name.startswith("classifier.") else prefix + name: array
        for name, array in state.items()
    }


def _config(
    target: Target, arrays: Arrays, backbone: Any, size: Sequence[int]
) -> Mapping[str, Any]:
    kernel, has_head = arrays["backbone/patch_embed/kernel"], "head/kernel" in arrays
    config = {
        "architectures": [target.headed if has_head else target.bare],
        "model_type": target.model_type,
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "image_size": _side(size),
        "patch_size": _side(kernel.shape[:2]),
        "num_channels": kernel.shape[2],
        "hidden_act": "silu" if backbone.mlp == "swiglu" else ACTIVATIONS[backbone.activation],
        "layer_norm_eps": backbone.norm_epsilon,
        "torch_dtype": "float32",
        **target.config(backbone, arrays),
    }
    if has_head:
        labels = [f"LABEL_{i}" for i in range(len(arrays["head/bias"]))]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    return config


def _side(size: Sequence[int]) -> int | list[int]:
    return size[0] if len(set(size)) == 1 else list(size)
