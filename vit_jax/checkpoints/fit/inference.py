"""Inference of the model that a checkpoint was trained as, from the names and shapes of arrays."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax import models
from vit_jax.checkpoints.fit import surgery
from vit_jax.checkpoints.weights import (
    CLS,
    PATCHES,
    POSITIONS,
    TEXT_HEAD,
    TOKEN_MIXING,
    Weights,
    count_blocks,
)
from vit_jax.errors import UserError

BLOCK = "backbone/blocks_0/"
SCORES = "decoder/score/dense3/bias"
BIT_ROOT = "backbone/root/conv/kernel"
STEM_ROOT = "backbone/stem/root/conv/kernel"
STEM_CONVOLUTION = r"backbone/stem/conv\d+/kernel"


def infer_model(weights: Weights, name: str | None = None, **fields: Any) -> nn.Module:
    """Builds the model that a checkpoint was trained as; see `infer_config`."""
    model = models.build(**infer_config(weights, name, **fields))
    scores = weights.arrays.get(SCORES)
    if not weights.detector or scores is None:
        return model
    return models.Detector(model, len(scores), **weights.detector)


@dataclasses.dataclass(frozen=True)
class TowersConfig:
    """The image-text model that a checkpoint was trained as.

    model, text: the arguments of `models.build` for each tower.
    dim, length: the length of vectors, and the number of tokens of a text.
    project_image, has_bias: whether there is a projection of images, and a bias of the logits.
    detects: whether a head detects what texts name. objectness: whether it knows objects as such.
    """

    model: Mapping[str, Any]
    text: Mapping[str, Any]
    dim: int
    length: int
    project_image: bool
    has_bias: bool
    detects: bool = False
    objectness: bool = False

    def build(self) -> models.TwoTowers | models.OpenVocabularyDetector:
        """Returns the model, whose first bias of the logits is 0 if there is one."""
        image, text = models.build(**self.model), models.build(**self.text)
        if self.detects:
            epsilon = self.model["norm_epsilon"]
            return models.OpenVocabularyDetector(
                image, text, self.dim, self.length, (), self.objectness, epsilon
            )
        return models.TwoTowers(
            image,
            text,
            self.dim,
            self.length,
            project_image=self.project_image,
            bias_init=0.0 if self.has_bias else None,
        )


def infer_towers(weights: Weights, name: str | None = None, **fields: Any) -> TowersConfig:
    """Returns the image-text model that a checkpoint was trained as.

    name, fields: those of the image tower, as in `infer_config`.

    Raises:
      UserError: the checkpoint has no text tower, or does not tell what that computes.
    """
    arrays, untold = weights.arrays, f"this {weights.format} does not tell"
    if TEXT_HEAD not in arrays:
        raise UserError(f"this {weights.format} has no text tower")
    if not weights.text_fields:
        raise UserError(
            f"{untold} what its text tower computes; the folders of transformers and open_clip do"
            " (a run of this package is given as --workdir)"
        )
    prefix = "text/"
    text = {n.replace(prefix, "backbone/", 1): arrays[n] for n in arrays if n.startswith(prefix)}
    try:
        vocab_size, width = text["backbone/token_embed"].shape
        _, length, _ = text[POSITIONS].shape
        _, dim = arrays[TEXT_HEAD].shape
        if not length or not dim:
            raise ValueError(f"texts of {length} tokens as vectors of {dim} numbers")
        sizes = {"vocab_size": vocab_size, "width": width, "depth": count_blocks(text)}
        block = _block(text)
    except (KeyError, IndexError, ValueError) as error:
        raise _misfit(weights, error) from error
    if block["num_heads"] is None:
        raise UserError(f"{untold} the heads of its text tower; its config.json does")
    return TowersConfig(
        model=infer_config(weights, name, **fields),
        text={"name": "text", **sizes, **block, **weights.text_fields},
        dim=dim,
        length=length,
        project_image="image_proj/kernel" in arrays,
        has_bias="bias" in arrays,
        detects="decoder/embed/kernel" in arrays,
        objectness="decoder/objectness/dense1/kernel" in arrays,
    )


def infer_config(weights: Weights, name: str | None = None, **fields: Any) -> dict[str, Any]:
    """Returns the arguments of `models.build` for the model that a checkpoint was trained as.

    Args:
      name: the name of a model, for what arrays do not tell (in state dicts, the number of heads).
      fields: fields of the model, which replace inferred ones: `position="sincos2d"`.

    Raises:
      UserError: something cannot be inferred, and neither `name` nor `fields` says it.
    """
    arrays = weights.arrays
    if BIT_ROOT in arrays:
        assumed = "bit_v1_r50x1" if "backbone/root/norm/scale" in arrays else "bit_r50x1"
        return {"name": name or assumed, **_bit(arrays), **fields}
    if not name and PATCHES not in arrays:
        raise UserError(f"this {weights.format} names no patch embedding; write --model=NAME")
    try:
        inferred = _mixer(arrays) if TOKEN_MIXING in arrays else _vit(weights)
    except (KeyError, IndexError, ValueError) as error:
        raise _misfit(weights, error) from error
    if name:
        fields = {**models.find_variant(name).fields, **fields}
    fields = {**inferred, **weights.fields, **fields}
    if "tokens_mlp_dim" in inferred:
        return {"name": name or "mixer_b16", **fields}
    missing = [key for key in ("num_heads", "position") if fields.get(key) is None]
    if "stem_width" in inferred:
        missing += [key for key in ("stem_strides", "stem_kernel") if key not in fields]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} cannot be told from this {weights.format}; write"
            f" {' '.join(f'--model.{key}=...' for key in missing)}"
            + (" or --model=NAME" if missing == ["num_heads"] else "")
        )
    if "stages" in inferred:
        return {"name": name or "r50_b16", **fields}
    if "stem_width" in inferred:
        return {"name": name or "conv_stem", **fields}
    return {"name": name or "vit", **fields}


def _misfit(weights: Weights, error: Exception) -> UserError:
    """Returns the error for arrays that make no model."""
    if isinstance(error, KeyError):
        return UserError(f"this {weights.format} lacks {error.args[0]}, which every model has")
    return UserError(f"this {weights.format} has arrays of other shapes ({error})")


def _common(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    height, width = arrays[PATCHES].shape[:2]
    return {
        "width": arrays[PATCHES].shape[3],
        "depth": count_blocks(arrays),
        "patch_size": height if height == width else (height, width),
        **_head(arrays),
    }


def _head(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if "head/bias" not in arrays:
        return {}
    inferred = {"num_classes": arrays["head/bias"].shape[0]}
    if "head/pre_logits/bias" in arrays:
        inferred["representation_size"] = arrays["head/pre_logits/bias"].shape[0]
    return inferred


def _mixer(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    dims = {
        f"{field}_mlp_dim": arrays[f"{BLOCK}{kind}_mixing/dense1/kernel"].shape[1]
        for field, kind in (("tokens", "token"), ("channels", "channel"))
    }
    if f"{BLOCK}token_mixing/dense2/kernel" not in arrays:  # ResMLP
        dims |= {"tokens_mlp_dim": 0, "norm": "affine"}
    if f"{BLOCK}scale1" in arrays:
        dims["layer_scale"] = 1.0
    return _common(arrays) | dims


def _vit(weights: Weights) -> dict[str, Any]:
    arrays = weights.arrays
    inferred = _common(arrays)
    inferred |= _outside_blocks(arrays)
    inferred |= _stem(arrays)
    if not inferred["depth"]:
        return inferred | {"num_heads": 1, "position": "none"}
    if POSITIONS in arrays:
        row, _ = surgery.split_class_row(
            arrays[POSITIONS], has_class_token=CLS in arrays, row_stored=weights.class_row
        )
        inferred |= {"position": "learned", "class_token_position": row is not None}
    else:
        inferred |= {"position": None, "class_token_position": False}
    inferred |= _block(arrays)
    bias = _position_bias(arrays)
    if bias and POSITIONS not in arrays:
        bias["position"] = "none"
    inferred |= bias
    inferred["block_positions"] = f"{BLOCK}positions" in arrays
    if inferred["position"] == "rope_mixed":
        inferred["position_table"] = POSITIONS in arrays
    if "backbone/registers" in arrays:
        inferred["num_registers"] = arrays["backbone/registers"].shape[1]
    return inferred


def _outside_blocks(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of the norms, the tokens and the pooling."""
    inferred: dict[str, Any] = {
        "patch_bias": "backbone/patch_embed/bias" in arrays,
        "distill_token": "backbone/distill" in arrays,
    }
    for name in ("embed_norm", "pre_norm", "fc_norm"):
        inferred[name] = f"backbone/{name}/scale" in arrays
    has_blocks = f"{BLOCK}mlp/dense1/kernel" in arrays
    inferred["last_norm"] = "backbone/norm/scale" in arrays or not has_blocks
    token = "mean" if CLS not in arrays else "token"
    if inferred["fc_norm"] and not inferred["last_norm"]:
        token = "mean"  # timm and BEiT move the last norm behind the pooling where they average.
    inferred["pooling"] = "map" if "backbone/map_head/probe" in arrays else token
    kernel, width = arrays.get("head/kernel"), arrays[PATCHES].shape[3]
    if token == "token" and kernel is not None and kernel.shape[:1] == (2 * width,):
        inferred["pooling"] = "token_mean"
    if inferred["pooling"] == "map":
        dim = arrays["backbone/map_head/probe"].shape[-1]
        inferred["map_dim"] = None if dim == width else dim
        inferred["map_mlp"] = "backbone/map_head/mlp/dense1/kernel" in arrays
    if inferred.get("map_mlp") and has_blocks:
        hidden, own = (
            arrays[f"{place}mlp/dense1/kernel"].shape[1] for place in ("backbone/map_head/", BLOCK)
        )
        inferred["map_mlp_dim"] = None if hidden == own else hidden
    if CLS in arrays and not inferred["pooling"].startswith("token"):
        inferred["class_token"] = True
    return inferred


def _block(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    query = arrays[f"{BLOCK}attn/query/kernel"]
    maps = 2 if f"{BLOCK}attn/difference/initial" in arrays else 1
    inferred: dict[str, Any] = {
        "num_heads": query.shape[1] // maps if query.ndim == 3 else None,
        "differential": maps == 2,
        "mlp_dim": arrays[f"{BLOCK}mlp/dense1/kernel"].shape[1],
        "norm": "layernorm" if f"{BLOCK}norm1/bias" in arrays else "rmsnorm",
        "mlp": "swiglu" if f"{BLOCK}mlp/gate/kernel" in arrays else "gelu",
        "qk_norm": f"{BLOCK}attn/query_norm/scale" in arrays,
        "parallel": f"{BLOCK}norm2/scale" not in arrays,
        "qkv_bias": f"{BLOCK}attn/query/bias" in arrays,
        "key_bias": f"{BLOCK}attn/key/bias" in arrays or f"{BLOCK}attn/query/bias" not in arrays,
        "proj_bias": f"{BLOCK}attn/out/bias" in arrays,
        "mlp_bias": f"{BLOCK}mlp/dense1/bias" in arrays,
        "attention_norm": f"{BLOCK}attn/norm/scale" in arrays,
        "mlp_norm": f"{BLOCK}mlp/norm/scale" in arrays,
    }
    if f"{BLOCK}scale1" in arrays:
        # The value matters at the start of training alone.
        inferred["layer_scale"] = 1.0
        inferred["mlp_layer_scale"] = inferred["parallel"] or f"{BLOCK}scale2" in arrays
    key, bias = arrays[f"{BLOCK}attn/key/kernel"], arrays.get(f"{BLOCK}attn/rope/frequencies")
    if key.shape != query.shape and key.ndim == 3:
        inferred["num_kv_heads"] = key.shape[1]
    if bias is not None:
        inferred |= {"position": "rope_mixed", "num_heads": bias.shape[1]}
    return inferred


def _position_bias(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the fields of a bias of attention by position, which every block has or all share."""
    for kind, place in (("", f"{BLOCK}attn/"), ("shared_", "backbone/")):
        table, hidden = (f"{place}position_bias/{leaf}" for leaf in ("table", "dense1/kernel"))
        if table in arrays:
            heads = arrays[table].shape[1]
            return {"position_bias": f"{kind}table", "num_heads": heads}
        if hidden in arrays:
            heads = arrays[f"{place}position_bias/dense2/kernel"].shape[1]
            dim = arrays[hidden].shape[1]
            fields = {"position_bias": f"{kind}mlp", "position_bias_dim": dim, "num_heads": heads}
            return fields
    return {}


def _bit(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return _resnet(arrays, BIT_ROOT) | _head(arrays)


def _stem(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if STEM_ROOT in arrays:
        return _resnet(arrays, STEM_ROOT)
    kernels = [x for name, x in sorted(arrays.items()) if re.fullmatch(STEM_CONVOLUTION, name)]
    if not kernels:
        return {}
    sides = tuple(kernel.shape[0] for kernel in kernels)
    norms = any(name.startswith("backbone/stem/norm") for name in arrays)
    fields = {"stem_width": kernels[0].shape[3], "stem_norm": norms}
    if any(side % 2 for side in sides):  # Such kernels may overlap.
        return fields
    return {**fields, "stem_strides": sides, "stem_kernel": None}


def _resnet(arrays: Mapping[str, np.ndarray], root: str) -> dict[str, Any]:
    """Returns the stages and the width of the ResNet whose first kernel is `root`."""
    prefix = root.removesuffix("root/conv/kernel") + "stage"
    units = {tuple(n.removeprefix(prefix).split("/")[:2]) for n in arrays if n.startswith(prefix)}
    stages = sorted({stage for stage, _ in units})
    counts = [sum(stage == other for other, _ in units) for stage in stages]
    return {"stages": tuple(counts), "width_factor": arrays[root].shape[3] / 64}
