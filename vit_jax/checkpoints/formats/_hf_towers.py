"""Folders for transformers' models of images and texts: CLIP and SigLIP."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints.formats import ImageSize, _hf_export, _torch_layout
from vit_jax.checkpoints.formats._hf import Family, State, _text, aimv2
from vit_jax.checkpoints.formats._hf_export import ACTIVATIONS, TARGETS, Target
from vit_jax.checkpoints.weights import Arrays, from_params, split_towers
from vit_jax.errors import UserError
from vit_jax.types import Params

_COMPUTATION = {"another norm epsilon", "exact GELU", "quick GELU", "SiLU"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTarget:
    """A class of transformers with both towers.

    Attributes:
      model_type, name: the value in the config, and the class.
      image: the class of the image tower.
      text: the names of the text tower's arrays.
      of_text: the traits that the text tower has; it may have those of activations and norms, too.
      has_bias: whether the logits have a bias, the image tower no projection, and that of texts a
        bias; otherwise none of these.
      config: further entries of the text tower's config.
    """

    model_type: str
    name: str
    image: Target
    text: Family
    of_text: frozenset[str]
    has_bias: bool
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def expresses(self) -> frozenset[str]:
        """The traits that there is a place for."""
        bias = {"the sigmoid loss's bias"} if self.has_bias else set()
        return self.image.expresses | self.of_text | bias | {"a text tower"}

    def misfit(self, model: models.TwoTowers) -> str:
        """Returns what the class lacks or has beside the model; empty if they fit."""
        image, text = (models.traits_of(tower) for tower in (model.backbone, model.text))
        if self.image.requires - image.all_named:
            return "another image tower"
        if self.of_text - _OPTIONAL - text.named or text.named - self.of_text - _COMPUTATION:
            return "another text tower"
        if self.has_bias == (model.bias_init is None):
            return "a bias of the logits" if self.has_bias else "no bias of the logits"
        if self.has_bias == model.project_image:
            return ("no" if self.has_bias else "a") + " projection of images"
        return ""


_OPTIONAL = {"an end token of texts"}

TWO_TARGETS = (
    TwoTarget(
        model_type="clip",
        name="CLIPModel",
        image=next(target for target in TARGETS if target.model_type == "clip_vision_model"),
        text=_text.CLIP,
        of_text=frozenset({"end pooling of texts", "a causal mask"} | _OPTIONAL),
        has_bias=False,
    ),
    TwoTarget(
        model_type="siglip",
        name="SiglipModel",
        image=next(target for target in TARGETS if target.model_type == "siglip_vision_model"),
        text=_text.SIGLIP,
        of_text=frozenset({"last pooling of texts"}),
        has_bias=True,
    ),
    TwoTarget(
        model_type="aimv2",
        name="Aimv2Model",
        image=TARGETS[-1],
        text=aimv2.TEXT,
        of_text=frozenset(
            {"end pooling of texts", "a causal mask", "norm='rmsnorm'", "mlp='swiglu'"}
            | {f"{part}_bias=False" for part in ("qkv", "proj", "mlp")}
            | _OPTIONAL
        ),
        has_bias=False,
        config={"qkv_bias": False, "mlp_bias": False},
    ),
)


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a folder with both towers; see `Format.write`.

    Raises:
      UserError: the class that has the names of this model computes something else.
    """
    assert isinstance(model, models.TwoTowers)
    backbone: Any = model.backbone
    text: Any = model.text
    traits = models.traits_of(model).all_named
    fitting = [target for target in TWO_TARGETS if traits <= target.expresses]
    target = next((one for one in fitting if not one.misfit(model)), None)
    if target is None:
        reasons = [f"{one.name} has {one.misfit(model)}" for one in fitting]
        raise UserError(f"hf has no class for these towers: {'; '.join(reasons)}; write --to=orbax")
    arrays = from_params(params, model)
    towers = split_towers(arrays)
    image, texts = towers["image"], towers["text"]
    config, state, _ = _hf_export.described(target.image, image, backbone, image_size)
    config["architectures"] = [target.image.bare]
    dim = arrays["text_proj/bias"].shape[0]
    described = {
        "architectures": [target.name],
        "model_type": target.model_type,
        "torch_dtype": "float32",
        "vision_config": config,
        "text_config": _text_config(target, texts, text, dim),
        **({} if target.has_bias else {"projection_dim": dim}),
    }
    state = {**state, **_text_state(target, texts)}
    scales = {theirs: arrays[ours] for theirs, ours in _text.BETWEEN.items() if ours in arrays}
    shape = (1,) if target.has_bias else ()
    state |= {name: scale.reshape(shape) for name, scale in scales.items()}
    _hf_export.write_folder(path, described, state)
    call = f"model = transformers.{target.name}.from_pretrained({os.fspath(path)!r})"
    return f"wrote {os.fspath(path)} for transformers\ntransformers: {call}"


def _text_config(target: TwoTarget, arrays: Arrays, text: Any, dim: int) -> dict[str, Any]:
    end = {} if target.has_bias else {"eos_token_id": text.end_token or _text.OLD_END}
    return {
        "model_type": target.text.model_types[0],
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.num_heads,
        "intermediate_size": _hf_export.mlp_dim(arrays),
        "vocab_size": text.vocab_size,
        "max_position_embeddings": arrays["backbone/pos_embed"].shape[1],
        "hidden_act": "silu" if text.mlp == "swiglu" else ACTIVATIONS[text.activation],
        ("rms_norm_eps" if text.norm == "rmsnorm" else "layer_norm_eps"): text.norm_epsilon,
        **target.config,
        **({"projection_size": dim} if target.has_bias else {"projection_dim": dim}),
        **end,
    }


def _text_state(target: TwoTarget, arrays: Arrays) -> State:
    state = _hf_export.as_table(_torch_layout.to_state(arrays, target.text.names))
    bias = f"{_text.TEXT_PROJECTION}.bias"
    if not target.has_bias:
        if np.any(state.pop(bias)):
            raise UserError(f"hf's {target.name} has no bias on its projections; write --to=orbax")
        inner = ("text_model.", f"{_text.TEXT_PROJECTION}.")
        return {n if n.startswith(inner) else f"text_model.{n}": x for n, x in state.items()}
    renamed = {n.replace(f"{_text.TEXT_PROJECTION}.", "head."): x for n, x in state.items()}
    return {f"text_model.{name}": array for name, array in renamed.items()}
