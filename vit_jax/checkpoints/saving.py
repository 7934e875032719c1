"""From a model's parameters to other codebases' files, where they can express the model."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints import files
from vit_jax.checkpoints.fit import surgery
from vit_jax.checkpoints.fit.merging import CLS, PATCHES, POSITIONS, sincos_table
from vit_jax.checkpoints.formats import bit, hf, npz, orbax, timm
from vit_jax.checkpoints.weights import backbone_of, from_params, has_head
from vit_jax.errors import UserError, nearest
from vit_jax.models.bert import Bert
from vit_jax.models.flexi import FlexiViT
from vit_jax.models.hybrid import Hybrid
from vit_jax.models.mixer import Mixer
from vit_jax.models.resnet import BiT
from vit_jax.models.text import TextTransformer
from vit_jax.models.vit import VisionTransformer
from vit_jax.types import Params

Arrays = dict[str, np.ndarray]
ImageSize = int | Sequence[int] | None

EXPRESSES: Mapping[str, frozenset[str]] = {
    "npz": frozenset(
        {"mean pooling", "class token", "no pooling", "a hybrid", "a Mixer", "a BiT", "no encoder"}
        | {"a representation layer", "a class token's position", "fixed positions"}
        | {"a text tower", "last pooling of texts"}
    ),
    "big_vision": frozenset(
        {"mean pooling", "class token", "no pooling", "attention pooling", "a FlexiViT"}
        | {"a representation layer", "sin-cos positions", "a text tower", "the sigmoid loss's bias"}
        | {f"{pooling} pooling of texts" for pooling in ("first", "last", "mean")}
    ),
    "timm": frozenset(
        {"mean pooling", "class token", "attention pooling", "a Mixer", "a class token's position"}
        | {"registers", "LayerScale", "query-key norm", "RMSNorm", "SwiGLU", "fixed positions"}
        | {"sin-cos positions", "no positions", "an unread class token"}
    ),
    "hf": frozenset({"class token", "a class token's position", "fixed positions"}),
}
FORMATS = (*EXPRESSES, "orbax")
ENDINGS = {"npz": ".npz", "big_vision": ".npz", "timm": ".safetensors"}

TEXT_HEAD = "text_proj/kernel"
"""What all models of two towers have, and no others."""


def save(
    params: Params,
    model: nn.Module,
    path: epath.PathLike,
    to: str,
    *,
    image_size: ImageSize = None,
) -> str:
    """Writes parameters for another codebase; they appear whole or not at all.

    Args:
      to: "npz" (vision_transformer, names as in the published files), "big_vision" (`.npz`),
        "timm" (`.safetensors`), "hf" (a directory for transformers) or "orbax" (a directory of
        ours, with the parameters alone).
      image_size: side of the images, or (height, width), where it cannot be told from a square
        grid of learned positions.

    Returns:
      What was written and the call that loads it, as text for a person.

    Raises:
      UserError: the format has no place for something in the model, named in the message.
    """
    if to not in FORMATS:
        raise UserError(f"format {to!r} is not known; {nearest(to, FORMATS)}")
    ending = ENDINGS.get(to, "")
    if not os.fspath(path).endswith(ending):
        raise UserError(f"{path}: a file for {to} has a name that ends in {ending}")
    if to == "orbax":
        orbax.write(path, params, model)
        return f"wrote {os.fspath(path)}: load with vit_jax.checkpoints.load(path, model)"
    backbone = backbone_of(model)
    _check_expressible(model, to)
    arrays = from_params(params, model)
    writers: Mapping[str, Callable[..., str]] = {
        "npz": _save_npz,
        "big_vision": _save_big_vision,
        "timm": _save_timm,
        "hf": _save_hf,
    }
    return writers[to](arrays, backbone, os.fspath(path), image_size)


def traits(model: nn.Module) -> set[str]:
    """What a format must be able to express, in words."""
    backbone = backbone_of(model)
    if isinstance(model, models.TwoTowers):
        return _two_tower_traits(model)
    if has_head(model) and not isinstance(model, models.Classifier):
        return {f"the head of a {type(model).__name__}"}
    found = {"a representation layer"} if getattr(model, "representation_size", None) else set()
    if isinstance(backbone, Mixer):
        return found | {"a Mixer"}
    if not isinstance(backbone, VisionTransformer):
        return found | {f"a {type(backbone).__name__}"}
    return found | _vit_traits(backbone)


def _two_tower_traits(model: models.TwoTowers) -> set[str]:
    """Those of the image tower, which must be a ViT that pools, and of what is beside it."""
    image, text = model.backbone, model.text
    if isinstance(image, VisionTransformer):
        unpooled = {"no pooling": "no pooling beside a text tower"}
        found = {unpooled.get(trait, trait) for trait in _vit_traits(image)}
    else:
        found = {f"a {type(image).__name__} beside a text tower"}
    found.add("a text tower")
    if isinstance(text, TextTransformer):
        found.add(f"{text.pooling} pooling of texts")
    elif not isinstance(text, Bert):
        found.add(f"a {type(text).__name__}")
    return found if model.bias_init is None else {*found, "the sigmoid loss's bias"}


def _vit_traits(backbone: VisionTransformer) -> set[str]:
    pooling = {"token": "class token", "mean": "mean pooling", "map": "attention pooling"}
    positions = {"none": "no positions", "sincos2d": "sin-cos positions", "learned": None}
    attends = backbone.pooling == "map"
    possible = {
        pooling.get(backbone.pooling, "no pooling"): True,
        positions.get(backbone.position, "rotary positions"): backbone.depth,
        "an unread class token": backbone.class_token and backbone.pooling in ("mean", "map"),
        "no encoder": not backbone.depth,
        "registers": backbone.num_registers,
        "LayerScale": backbone.layer_scale is not None,
        "query-key norm": backbone.qk_norm,
        "query-key norm in attention pooling": backbone.qk_norm and attends,
        "SwiGLU": backbone.mlp == "swiglu",
        "SwiGLU in attention pooling": backbone.mlp == "swiglu" and attends,
        "RMSNorm": backbone.norm == "rmsnorm",
        "parallel blocks": backbone.parallel,
        "a distillation token": backbone.distill_token,
        "attention within windows": backbone.window,
        "a FlexiViT": isinstance(backbone, FlexiViT),
        "a hybrid": isinstance(backbone, Hybrid),
    }
    return {trait for trait, present in possible.items() if present and trait}


def _check_expressible(model: nn.Module, to: str) -> None:
    """Raises `UserError` with the reason where the format has no place for part of the model."""
    found = traits(model)
    lacking = sorted(found - _expressed(to))
    if lacking:
        others = [name for name in EXPRESSES if found <= _expressed(name)]
        hint = " or ".join([*others, "orbax"])
        raise UserError(f"{to} has no place for {', '.join(lacking)}; write --to={hint}")


def _expressed(to: str) -> frozenset[str]:
    # Positions that a model computes can be written out as if they had been learned.
    computed = {"sin-cos positions", "no positions"}
    return EXPRESSES[to] | (computed if "fixed positions" in EXPRESSES[to] else set())


def _save_npz(arrays: Arrays, backbone: Any, path: str, image_size: ImageSize) -> str:
    if isinstance(backbone, BiT):
        return _save_bit(arrays, backbone, path)
    mixer = isinstance(backbone, Mixer)
    if not mixer and backbone.depth:
        arrays, _ = _positions(arrays, backbone, image_size, class_row=True)
    if TEXT_HEAD in arrays:
        files.write_npz(path, npz.write(arrays, npz.LIT))
        return f"wrote {path} in LiT's released names: models_lit.LitModel with {_lit_call(arrays)}"
    files.write_npz(path, npz.write(arrays, npz.MIXER if mixer else npz.VISION_TRANSFORMER))
    lines = [f"wrote {path} in vision_transformer's published names"]
    plain = not isinstance(backbone, Hybrid) and not mixer and backbone.depth
    if "head/pre_logits/kernel" in arrays:
        lines.append("timm: it would read this file and leave out pre_logits without a word")
    elif plain and backbone.pooling in ("token", "mean"):
        class_row = CLS in arrays
        if image_size or surgery.square_side(arrays[POSITIONS].shape[1] - class_row):
            size = _image_size(arrays, image_size, class_row)
            call = timm.call(path, arrays, backbone, size, class_row=class_row)
            lines.append(f"timm: {call}")
    return "\n".join(lines)


def _lit_call(arrays: Arrays) -> str:
    """What tells vision_transformer's LitModel the parts of this model."""
    dims = [
        arrays.get(f"{tower}_proj/bias", np.empty(0)).size or None for tower in ("image", "text")
    ]
    text = "bert" if "text/segment_embed" in arrays else "text_transformer"
    return f"text_model={text!r}, out_dim=({dims[0]}, {dims[1]})"


def _save_bit(arrays: Arrays, backbone: BiT, path: str) -> str:
    files.write_npz(path, bit.write(arrays))
    call = timm.bit_call(path, arrays, backbone)
    return f"wrote {path} in BiT's published names\ntimm: {call}"


def _save_big_vision(arrays: Arrays, backbone: Any, path: str, image_size: ImageSize) -> str:
    if backbone.position == "learned":
        arrays, _ = _positions(arrays, backbone, image_size, class_row=False)
    files.write_npz(path, npz.write(arrays, npz.BIG_VISION, "params/"))
    pool = {"token": "tok", "mean": "gap", "map": "map"}.get(backbone.pooling, "none")
    position = "sincos2d" if backbone.position == "sincos2d" else "learn"
    rep_size = arrays.get("head/pre_logits/bias", np.empty(0)).shape[0]
    towers = "models.proj.image_text.two_towers, its images " if TEXT_HEAD in arrays else ""
    return (
        f"wrote {path} in big_vision's names: {towers}models.vit with"
        f" pool_type={pool!r}, posemb={position!r}, rep_size={rep_size or False}, scan=False"
    )


def _save_timm(arrays: Arrays, backbone: Any, path: str, image_size: ImageSize) -> str:
    class_row = False
    if isinstance(backbone, Mixer):
        tokens = arrays["backbone/blocks_0/token_mixing/dense1/kernel"].shape[0]
        size = _check_size(arrays, image_size, tokens)
    elif backbone.position == "none":
        size = _check_size(arrays, image_size or models.variants()["vit_b16"].input_size, None)
    else:
        # timm's table has rows for the class token and the registers, or for neither.
        wanted = False if backbone.num_registers else None
        arrays, class_row = _positions(arrays, backbone, image_size, class_row=wanted)
        size = _image_size(arrays, image_size, class_row)
    files.write_safetensors(path, timm.write(arrays, backbone))
    call = timm.call(path, arrays, backbone, size, class_row=class_row)
    return f"wrote {path} in timm's names\ntimm: {call}"


def _save_hf(arrays: Arrays, backbone: Any, path: str, image_size: ImageSize) -> str:
    arrays, class_row = _positions(arrays, backbone, image_size, class_row=True)
    size = _image_size(arrays, image_size, class_row)
    hf.write_directory(path, arrays, backbone, size)
    return f"wrote {path} for transformers\ntransformers: {hf.call(path, arrays)}"


def _positions(
    arrays: Arrays, backbone: Any, image_size: ImageSize, *, class_row: bool | None
) -> tuple[Arrays, bool]:
    """The arrays with a table of positions, and whether it has a row for the class token.

    Positions that the model computes are written out; none are a table of zeros. class_row: True
    and False put that row in (zero) or out (added to the class token); None leaves it.
    """
    held = POSITIONS in arrays and CLS in arrays and backbone.class_token_position
    if POSITIONS not in arrays:
        arrays = {**arrays, POSITIONS: _computed_positions(arrays, backbone, image_size)}
    table = arrays[POSITIONS]
    if class_row and CLS in arrays and not held:
        table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
        return {**arrays, POSITIONS: table}, True
    if class_row is False and held:
        folded = {CLS: arrays[CLS] + table[:, :1], POSITIONS: table[:, 1:]}
        return {**arrays, **folded}, False
    return arrays, held


def _computed_positions(arrays: Arrays, backbone: Any, image_size: ImageSize) -> np.ndarray:
    if image_size is None or isinstance(backbone, Hybrid):
        raise UserError(
            f"position={backbone.position!r} has to be written out as a table, whose size is not"
            " known; write image_size=(height, width), for a hybrid --to=orbax"
        )
    height, width = _check_size(arrays, image_size, None)
    patch_height, patch_width = arrays[PATCHES].shape[:2]
    grid = (height // patch_height, width // patch_width)
    if backbone.position == "sincos2d":
        return sincos_table(grid, backbone.width)
    return np.zeros((1, grid[0] * grid[1], backbone.width), np.float32)


def _image_size(arrays: Arrays, given: ImageSize, class_row: bool) -> tuple[int, int]:
    """Of images that fill the position table."""
    return _check_size(arrays, given, arrays[POSITIONS].shape[1] - int(class_row))


def _check_size(arrays: Arrays, given: ImageSize, num_patches: int | None) -> tuple[int, int]:
    """(height, width) as given, or of a square grid of `num_patches`."""
    height, width = arrays[PATCHES].shape[:2]
    if given is None:
        side = surgery.square_side(num_patches or 0)
        if side is None:
            raise UserError(
                f"{num_patches} patches make no square image; write image_size=(height, width)"
            )
        return side * height, side * width
    size = (given, given) if isinstance(given, int) else (int(given[0]), int(given[1]))
    patches = -(-size[0] // height) * -(-size[1] // width), size[0] // height * (size[1] // width)
    if num_patches is not None and num_patches not in patches:
        raise UserError(
            f"image_size={size} makes {patches[1]} patches, the model has {num_patches}"
        )
    return size
