"""Names of the arrays in files of BiT (Kolesnikov et al. 2020): big_transfer's and big_vision's.

    big_transfer, the published files              ours
    resnet/root_block/standardized_conv2d/kernel   backbone/root/conv/kernel
    resnet/block1/unit01/a/standardized_conv2d/..  backbone/stage1/unit1/conv1/kernel
    resnet/block1/unit01/a/group_norm/gamma        backbone/stage1/unit1/norm1/scale
    resnet/block1/unit01/a/proj/...                backbone/stage1/unit1/conv_proj/kernel
    resnet/group_norm/beta                         backbone/norm/bias
    resnet/head/conv2d/kernel [1, 1, dim, classes] head/kernel [dim, classes]

big_vision (`bit_paper`) calls them root_block/conv_root, block1/unit01/{conv1,gn1}, norm-pre-head
and head. Kernels are laid out as ours. TensorFlow has added a number to some names.
"""

import re
from collections.abc import Mapping

import numpy as np

from vit_jax.checkpoints.weights import Weights

PREFIX = "resnet/"
_PARTS = "abc"
_VALUES = {"kernel": "kernel", "gamma": "scale", "beta": "bias"}
_TENSORFLOW = re.compile(r"(standardized_conv2d|group_norm|conv2d)_\d+/")


def matches(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether these names are of a BiT's file."""
    return any("root_block/" in name for name in arrays)


def read(arrays: Mapping[str, np.ndarray]) -> Weights:
    """Arrays under our names."""
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
    """Heads that were 1x1 convolutions are matrices here; norms have no axes of the image."""
    if name == "head/kernel" and array.shape[:2] == (1, 1):
        return array[0, 0]
    is_norm = name.endswith(("/scale", "/bias"))
    return array.reshape(-1) if is_norm and array.shape[:-1] == (1, 1, 1) else array


def write(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `read`, under the published names."""
    out = {}
    for name, array in arrays.items():
        theirs = _to_big_transfer(name)
        out[PREFIX + theirs] = array[None, None] if theirs == "head/conv2d/kernel" else array
    return out


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
