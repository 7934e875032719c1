"""Files of BiT (Kolesnikov et al. 2020), in the names of big_transfer or of big_vision.

    big_transfer, the published files              this package
    resnet/root_block/standardized_conv2d/kernel   backbone/root/conv/kernel
    resnet/block1/unit01/a/standardized_conv2d/..  backbone/stage1/unit1/conv1/kernel
    resnet/block1/unit01/a/group_norm/gamma        backbone/stage1/unit1/norm1/scale
    resnet/block1/unit01/a/proj/...                backbone/stage1/unit1/conv_proj/kernel
    resnet/group_norm/beta                         backbone/norm/bias
    resnet/head/conv2d/kernel [1, 1, dim, classes] head/kernel [dim, classes]

big_vision (`bit_paper`) calls them root_block/conv_root, block1/unit01/{conv1,gn1}, norm-pre-head
and head. Kernels have the layout of this package. TensorFlow has added a number to some names.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from vit_jax import models
from vit_jax.checkpoints import files
from vit_jax.checkpoints.formats import Format, ImageSize
from vit_jax.checkpoints.source import Source
from vit_jax.checkpoints.weights import Weights, from_params
from vit_jax.types import Params

PREFIX = "resnet/"
_PARTS = "abc"
_VALUES = {"kernel": "kernel", "gamma": "scale", "beta": "bias"}
_TENSORFLOW = re.compile(r"(standardized_conv2d|group_norm|conv2d)_\d+/")


def matches(source: Source) -> bool:
    """Returns whether a file has names of a BiT's."""
    return any("root_block/" in name for name in source.names)


def read(source: Source) -> Weights:
    """Returns the weights of a file."""
    arrays = source.arrays()
    published = any(name.startswith(PREFIX) for name in arrays)
    prefix = next(n for n in arrays if "root_block/" in n).partition("root_block/")[0]
    to_ours = _from_big_transfer if published else _from_big_vision
    found: dict[str, np.ndarray] = {}
    ignored, unknown = [], []
    for name, array in arrays.items():
        if not name.startswith(prefix):
            ignored.append(f"{name}: outside the model's own arrays (optimizer state or counters)")
            continue
        ours = to_ours(name.removeprefix(prefix))
        if ours is None:
            unknown.append(name)
        else:
            found[ours] = _common_shape(ours, array)
    origin = "published names" if published else "big_vision naming"
    return Weights(
        arrays=found,
        format=f"npz of a BiT ({origin})",
        ignored=tuple(ignored),
        unknown=tuple(unknown),
    )


def _from_big_transfer(name: str) -> str | None:
    name = _TENSORFLOW.sub(r"\1/", name)
    whole = {
        "root_block/standardized_conv2d/kernel": "backbone/root/conv/kernel",
        "group_norm/gamma": "backbone/norm/scale",
        "group_norm/beta": "backbone/norm/bias",
        "head/conv2d/kernel": "head/kernel",
        "head/conv2d/bias": "head/bias",
    }
    unit = re.fullmatch(
        r"block(\d+)/unit(\d+)/([abc])/(proj/standardized_conv2d|standardized_conv2d|group_norm)"
        r"/(kernel|gamma|beta)",
        name,
    )
    if not unit:
        return whole.get(name)
    stage, number, part, module, value = unit.groups()
    kind = "norm" if module == "group_norm" else "conv"
    which = "_proj" if module.startswith("proj") else str(_PARTS.index(part) + 1)
    return f"backbone/stage{stage}/unit{int(number)}/{kind}{which}/{_VALUES[value]}"


def _from_big_vision(name: str) -> str | None:
    whole = {
        "root_block/conv_root/kernel": "backbone/root/conv/kernel",
        "norm-pre-head/scale": "backbone/norm/scale",
        "norm-pre-head/bias": "backbone/norm/bias",
        "head/kernel": "head/kernel",
        "head/bias": "head/bias",
    }
    unit = re.fullmatch(
        r"block(\d+)/unit(\d+)/(conv|gn)(\d|_proj)/(kernel|scale|bias)",
        name,
    )
    if not unit:
        return whole.get(name)
    stage, number, module, which, value = unit.groups()
    kind = "norm" if module == "gn" else "conv"
    return f"backbone/stage{stage}/unit{int(number)}/{kind}{which}/{value}"


def _common_shape(name: str, array: np.ndarray) -> np.ndarray:
    """Makes matrices of heads that are 1x1 convolutions, and vectors of norms."""
    if name == "head/kernel" and array.shape[:2] == (1, 1):
        return array[0, 0]
    is_norm = name.endswith(("/scale", "/bias"))
    return array.reshape(-1) if is_norm and array.shape[:-1] == (1, 1, 1) else array


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes a file in the published names; see `Format.write`."""
    del image_size
    arrays, path = from_params(params, model), os.fspath(path)
    out = {}
    for name, array in arrays.items():
        theirs = _to_big_transfer(name)
        out[PREFIX + theirs] = array[None, None] if theirs == "head/conv2d/kernel" else array
    files.write_npz(path, out)
    call = timm_call(path, arrays, models.backbone_of(model))
    return f"wrote {path} in BiT's published names\ntimm: {call}"


def timm_call(path: str, arrays: Mapping[str, np.ndarray], backbone: Any) -> str:
    """Returns the statements that make `model`, in timm, of such a file."""
    arguments = {
        "layers": list(backbone.stages),
        "width_factor": backbone.width_factor,
        "num_classes": len(arrays.get("head/bias", np.empty(0))),
        "in_chans": arrays["backbone/root/conv/kernel"].shape[2],
        "stem_type": "'fixed'",
        "conv_layer": "functools.partial(timm.layers.StdConv2d, eps=1e-8)",
    }
    text = ", ".join(f"{key}={value}" for key, value in arguments.items())
    made = f"model = timm.models.resnetv2.ResNetV2({text})"
    return f"{made}; model.load_pretrained({path!r})"


def _to_big_transfer(name: str) -> str:
    values = {ours: theirs for theirs, ours in _VALUES.items()}
    unit = re.fullmatch(r"backbone/stage(\d+)/unit(\d+)/(conv|norm)(\d|_proj)/(\w+)", name)
    if unit:
        stage, number, kind, which, value = unit.groups()
        part = "a/proj" if which == "_proj" else _PARTS[int(which) - 1]
        module = "group_norm" if kind == "norm" else "standardized_conv2d"
        return f"block{stage}/unit{int(number):02d}/{part}/{module}/{values[value]}"
    return {
        "backbone/root/conv/kernel": "root_block/standardized_conv2d/kernel",
        "backbone/norm/scale": "group_norm/gamma",
        "backbone/norm/bias": "group_norm/beta",
        "head/kernel": "head/conv2d/kernel",
        "head/bias": "head/conv2d/bias",
    }[name]


FORMAT = Format(
    label="npz of BiT",
    matches=matches,
    read=read,
    write=write,
    expresses=frozenset({"a BiT"}),
    ending=".npz",
)
