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
from vit_jax.checkpoints.formats._hf import (
    Family,
    State,
    aimv2,
    beit,
    clip,
    dinov2,
    dinov3,
    siglip,
    vit,
)
from vit_jax.checkpoints.formats._hf._text import VISUAL_PROJECTION
from vit_jax.checkpoints.source import CONFIG
from vit_jax.checkpoints.weights import POSITIONS, Arrays, from_params
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

_OF_CLIP = frozenset({"a norm before the blocks", "no bias of patches"})
_OF_BEIT = frozenset({"no bias of keys"})
_OF_AIMV2 = frozenset(
    {"a ViT", "RMSNorm", "SwiGLU", "a norm of patches", "mean pooling"}
    | {"no biases of queries, keys and values", "no bias after attention", "no biases in the MLP"}
)
_OF_AIMV2_HEAD = (_OF_AIMV2 - {"mean pooling"}) | {
    *("attention pooling", "attention pooling without an MLP", "SwiGLU in attention pooling"),
}
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
      expresses: the traits that it has a place for. requires: those that it has always.
      bare, headed: the names of the class without and with a classifier; "" where there is none.
      call: arguments of the class without a classifier, after the path.
      prefix: that of the encoder's names; with a classifier alone unless `always`.
      class_row: whether positions have a row for a class token. table: whether there are positions
        always, which are zeros for a model without them.
      config: returns further entries of the config.
      arrays: returns the arrays that the class has, from those of the model.
      state: returns the state dict that the class has, from one with the names of `family`.
    """

    family: Family
    model_type: str
    expresses: frozenset[str]
    requires: frozenset[str] = frozenset()
    bare: str
    headed: str = ""
    call: str = ""
    prefix: str = ""
    always: bool = False
    class_row: bool = True
    table: bool = True
    config: Extra = _nothing
    arrays: Callable[[Arrays], Arrays] = dict
    state: Callable[[State], State] = dict


def _plain(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    del backbone
    return {"intermediate_size": mlp_dim(arrays), "qkv_bias": True}


def mlp_dim(arrays: Arrays) -> int:
    """Returns the width of the MLPs of an encoder."""
    return arrays["backbone/blocks_0/mlp/dense1/kernel"].shape[1]


def _of_dinov2(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    ratio, rest = divmod(mlp_dim(arrays), backbone.width)
    if rest:
        raise UserError(
            f"hf has no place for an MLP of width {mlp_dim(arrays)}, which is no multiple of"
            f" {backbone.width}, in a DINOv2; write --to=timm or orbax"
        )
    found = {"mlp_ratio": ratio, "qkv_bias": True, "use_swiglu_ffn": False}
    registers = {"num_register_tokens": backbone.num_registers} if backbone.num_registers else {}
    return found | registers


def _of_dinov3(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    return {
        "intermediate_size": mlp_dim(arrays),
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


def _of_beit(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    shared = backbone.position_bias == "shared_table"
    return {
        "intermediate_size": mlp_dim(arrays),
        "use_absolute_position_embeddings": POSITIONS in arrays,
        "use_relative_position_bias": backbone.position_bias == "table",
        "use_shared_relative_position_bias": shared,
        "use_mean_pooling": backbone.pooling == "mean",
        "layer_scale_init_value": backbone.layer_scale or 0.0,
    }


def _of_aimv2(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    found = {"rms_norm_eps": backbone.norm_epsilon, "intermediate_size": mlp_dim(arrays)}
    return found | {"use_head": False, "qkv_bias": False, "mlp_bias": False}


def _of_pooled_aimv2(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    return {**_of_aimv2(backbone, arrays), "use_head": True, **_projected(arrays)}


def _projected(arrays: Arrays) -> dict[str, Any]:
    kernel = arrays.get("head/kernel")
    return {} if kernel is None else {"projection_dim": kernel.shape[1]}


def _of_clip(backbone: Any, arrays: Arrays) -> dict[str, Any]:
    del backbone
    return {"intermediate_size": mlp_dim(arrays), **_projected(arrays)}


def as_table(state: State) -> State:
    """Makes positions a matrix, and a class token a vector."""
    shapes = {"position_embedding.weight": (-1,), "class_embedding": ()}
    for ending, shape in shapes.items():
        for name in [n for n in state if n.endswith(ending)]:
            state = {**state, name: state[name].reshape(*shape, state[name].shape[-1])}
    return state


def _without_bias(state: State) -> State:
    """Leaves out the zeros of a projection that has no bias.

    Raises:
      UserError: they are no zeros.
    """
    name = f"{VISUAL_PROJECTION}.bias"
    if np.any(state.get(name, 0)):
        raise UserError(
            "hf has no place for a bias on the projection of images; write --to=timm or orbax, or"
            " the backbone alone"
        )
    return as_table({n: array for n, array in state.items() if n != name})


def _of_aimv2_head(state: State) -> State:
    return aimv2.without_idle_layers(_without_bias(state))


def _joined(state: State) -> State:
    """Joins the projections of the attention pooling, and makes the positions a matrix."""
    out = as_table(state)
    for leaf in ("weight", "bias"):
        names = [f"head.attention.{part}.{leaf}" for part in ("query", "key", "value")]
        out[f"head.attention.in_proj_{leaf}"] = np.concatenate([out.pop(name) for name in names])
    return out


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
    Target(
        family=vit.FAMILY,
        model_type="ijepa",
        expresses=_COMMON | _TABLE | {"mean pooling"},
        bare="IJepaModel",
        headed="IJepaForImageClassification",
        call=", add_pooling_layer=False",
        prefix="ijepa.",
        class_row=False,
        config=_plain,
    ),
    Target(
        family=clip.FAMILY,
        model_type="clip_vision_model",
        expresses=_COMMON | _TABLE | {"class token"} | _OF_CLIP,
        requires=_OF_CLIP,
        bare="CLIPVisionModel",
        headed="CLIPVisionModelWithProjection",
        prefix="vision_model.",
        always=True,
        config=_of_clip,
        state=_without_bias,
    ),
    Target(
        family=beit.FAMILY,
        model_type="beit",
        expresses=_COMMON
        | _OF_BEIT
        | {"class token", "mean pooling", "a norm after pooling", "no last norm"}
        | {"an unread class token", "LayerScale", "no positions"}
        | {"position_bias='table'", "position_bias='shared_table'"},
        requires=_OF_BEIT,
        bare="BeitModel",
        headed="BeitForImageClassification",
        prefix="beit.",
        table=False,
        config=_of_beit,
    ),
    Target(
        family=aimv2.FAMILY,
        model_type="aimv2_vision_model",
        expresses=_OF_AIMV2 | {"another norm epsilon"},
        requires=_OF_AIMV2,
        bare="Aimv2VisionModel",
        class_row=False,
        config=_of_aimv2,
        state=as_table,
    ),
    Target(
        family=aimv2.FAMILY,
        model_type="aimv2_vision_model",
        expresses=_OF_AIMV2_HEAD | {"another norm epsilon"},
        requires=_OF_AIMV2_HEAD,
        bare="Aimv2VisionModel",
        prefix="vision_model.",
        class_row=False,
        config=_of_pooled_aimv2,
        state=_of_aimv2_head,
    ),
)


def target_of(model: nn.Module) -> Target:
    """Returns the class that expresses a model, of which one has a place for all its traits.

    Raises:
      UserError: the class has something that the model has not, or has no classifier, and the model
        has one.
    """
    traits = models.traits_of(model).all_named
    fitting = [target for target in TARGETS if traits <= target.expresses]
    found = next((target for target in fitting if target.requires <= traits), None)
    if found is None:
        lacking = sorted(fitting[0].requires - traits)[0]
        raise UserError(
            f"hf has no place for this model but {fitting[0].bare}, which has {lacking}; write"
            " --to=timm or orbax"
        )
    if models.has_head(model) and not found.headed:
        raise UserError(
            f"hf has no place for a classifier on {found.bare}; write --to=timm or orbax, or the"
            " backbone alone"
        )
    return found


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a folder with `config.json` and `model.safetensors`; see `Format.write`."""
    target, backbone = target_of(model), models.backbone_of(model)
    config, state, arrays = described(target, from_params(params, model), backbone, image_size)
    write_folder(path, config, state)
    name, more = target.headed, ""
    if "head/kernel" not in arrays:
        name, more = target.bare, target.call
    call = f"model = transformers.{name}.from_pretrained({os.fspath(path)!r}{more})"
    return f"wrote {os.fspath(path)} for transformers\ntransformers: {call}"


def described(
    target: Target, arrays: Arrays, backbone: Any, image_size: ImageSize
) -> tuple[dict[str, Any], State, Arrays]:
    """Returns the config, the state dict, and the arrays with positions as the class has them."""
    if backbone.position == "rope_dinov3":
        size = positions.check_size(arrays, image_size or 224, None)
    elif POSITIONS not in arrays and not target.table:
        size = positions.size_of_offsets(arrays, image_size)
    else:
        row = target.class_row
        arrays, class_row = positions.stored(arrays, backbone, image_size, class_row=row)
        size = positions.image_size_of(arrays, image_size, class_row)
    return _config(target, arrays, backbone, size), _state(target, arrays), arrays


def write_folder(path: epath.PathLike, config: Mapping[str, Any], state: State) -> None:
    """Writes a folder of transformers, whole or not at all."""
    contents = {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        "model.safetensors": files.safetensors_bytes(state),
    }
    files.write_directory(path, contents)


def _state(target: Target, arrays: Arrays) -> State:
    state = target.state(_torch_layout.to_state(target.arrays(arrays), target.family.names))
    prefix = target.prefix if target.always or "head/kernel" in arrays else ""
    heads = ("classifier.", f"{VISUAL_PROJECTION}.")
    return {
        name if name.startswith(heads) else prefix + name: array for name, array in state.items()
    }


def _config(target: Target, arrays: Arrays, backbone: Any, size: Sequence[int]) -> dict[str, Any]:
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
    if has_head and "projection_dim" not in config:
        labels = [f"LABEL_{i}" for i in range(len(arrays["head/bias"]))]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    return config


def _side(size: Sequence[int]) -> int | list[int]:
    return size[0] if len(set(size)) == 1 else list(size)
