"""big_vision's `.npz` files."""

import os

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints import files
from vit_jax.checkpoints.formats import Format, ImageSize, _jax_names
from vit_jax.checkpoints.formats import _positions as positions
from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import TEXT_HEAD, from_params
from vit_jax.types import Params

EXPRESSES = frozenset(
    {"a ViT", "mean pooling", "class token", "no pooling", "attention pooling", "a FlexiViT"}
    | {"a representation layer", "sin-cos positions", "a text tower", "the sigmoid loss's bias"}
    | {f"{pooling} pooling of texts" for pooling in ("first", "last", "mean")}
)


def matches(source: Source) -> bool:
    """Returns whether a file has names of big_vision's."""
    return _jax_names.is_big_vision(source.names)


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a file; see `Format.write`."""
    traits, backbone = models.traits_of(model), models.backbone_of(model)
    arrays, path = from_params(params, model), os.fspath(path)
    if traits.position == "learned":
        arrays, _ = positions.stored(arrays, backbone, image_size, class_row=False)
    files.write_npz(path, _jax_names.write(arrays, _jax_names.BIG_VISION, "params/"))
    pools = {"class token": "tok", "mean pooling": "gap", "attention pooling": "map"}
    pool = next((pools[name] for name in pools if name in traits.named), "none")
    position = "sincos2d" if traits.position == "sincos2d" else "learn"
    rep_size = arrays.get("head/pre_logits/bias", np.empty(0)).shape[0]
    towers = "models.proj.image_text.two_towers, its images " if TEXT_HEAD in arrays else ""
    return (
        f"wrote {path} in big_vision's names: {towers}models.vit with"
        f" pool_type={pool!r}, posemb={position!r}, rep_size={rep_size or False}, scan=False"
    )


FORMAT = Format(
    label="npz of big_vision",
    matches=matches,
    read=_jax_names.read,
    write=write,
    expresses=EXPRESSES,
    ending=".npz",
)
