"""vision_transformer's `.npz` files, in the names of the published ones."""

import os

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints import files
from vit_jax.checkpoints.fit import surgery
from vit_jax.checkpoints.formats import Format, ImageSize, _jax_names, bit, timm
from vit_jax.checkpoints.formats import _positions as positions
from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import CLS, POSITIONS, TEXT_HEAD, Arrays, from_params
from vit_jax.types import Params

EXPRESSES = frozenset(
    {"a ViT", "mean pooling", "class token", "no pooling", "a hybrid", "a Mixer", "a BiT"}
    | {"no encoder", "a representation layer", "sin-cos positions", "no positions"}
    | {"a text tower", "last pooling of texts"}
)


def matches(source: Source) -> bool:
    """Returns whether a file has names of vision_transformer's."""
    names = source.names
    return _jax_names.matches(names) and not _jax_names.is_big_vision(names)


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a file, in BiT's names if the model is one; see `Format.write`."""
    traits, backbone = models.traits_of(model), models.backbone_of(model)
    if traits.kind == "a BiT":
        return bit.write(path, params, model, image_size)
    arrays, path = from_params(params, model), os.fspath(path)
    naming = _jax_names.MIXER if traits.kind == "a Mixer" else _jax_names.VISION_TRANSFORMER
    if traits.kind == "a ViT" and "no encoder" not in traits.named:
        arrays, _ = positions.stored(arrays, backbone, image_size, class_row=True)
    if TEXT_HEAD in arrays:
        files.write_npz(path, _jax_names.write(arrays, _jax_names.LIT))
        return f"wrote {path} in LiT's released names: models_lit.LitModel with {_lit_call(arrays)}"
    files.write_npz(path, _jax_names.write(arrays, naming))
    lines = [f"wrote {path} in vision_transformer's published names"]
    if "a representation layer" in traits.named:
        lines.append("timm: it would read this file and leave out pre_logits without a word")
    elif traits.kind == "a ViT" and not traits.named & {"a hybrid", "no encoder", "no pooling"}:
        class_row = CLS in arrays
        if image_size or surgery.square_side(arrays[POSITIONS].shape[1] - class_row):
            size = positions.image_size_of(arrays, image_size, class_row)
            args = timm.arguments(arrays, backbone, size, class_row=class_row)
            lines.append(f"timm: {timm.call(path, backbone, args)}")
    return "\n".join(lines)


def _lit_call(arrays: Arrays) -> str:
    """Returns the fields of vision_transformer's LitModel for the parts of this model."""
    dims = [
        arrays.get(f"{tower}_proj/bias", np.empty(0)).size or None for tower in ("image", "text")
    ]
    text = "bert" if "text/segment_embed" in arrays else "text_transformer"
    return f"text_model={text!r}, out_dim=({dims[0]}, {dims[1]})"


FORMAT = Format(
    label="npz of vision_transformer",
    matches=matches,
    read=_jax_names.read,
    write=write,
    expresses=EXPRESSES,
    ending=".npz",
)
