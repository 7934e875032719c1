"""What a config's batches will look like, told without the data and without TensorFlow.

For planning: the datasets that the published recipes train on are known by name, and of a
preprocessing string only what it does to shapes and dtypes is followed.
"""

import ast
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit_jax.data.pp import operands
from vit_jax.data.sources._splits import parse_split, split_range
from vit_jax.errors import UserError
from vit_jax.types import ArraySpec

# name in TFDS: (classes, examples of each split), from TFDS's catalogue; imagenet21k as the AugReg
# models saw it (Steiner et al. 2022, section 3.1: 14,197,122 images of 21,841 classes; the label
# space of its builders has 21,843 entries).
KNOWN: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "cifar10": (10, {"train": 50_000, "test": 10_000}),
    "cifar100": (100, {"train": 50_000, "test": 10_000}),
    "digits": (10, {"train": 1_437, "test": 360}),
    "imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet21k": (21_843, {"full": 14_197_122, "train": 14_197_122}),
    "oxford_flowers102": (102, {"train": 1_020, "validation": 1_020, "test": 6_149}),
    "oxford_iiit_pet": (37, {"train": 3_680, "test": 3_669}),
}

_Shape = tuple[int | None, ...]
_Fields = dict[str, tuple[_Shape, type]]
_SAME = {
    "flip_lr", "randaug", "random_affine", "color_jitter", "three_augment", "clip_value_range",
}  # fmt: skip
_TO_SIZE = {
    "resize", "central_crop", "random_crop", "inception_crop", "decode_jpeg_and_inception_crop",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Expected:
    """Stands for a source that is not at hand: enough to plan a run, nothing to read from."""

    spec: Mapping[str, ArraySpec]
    num_examples: int
    num_classes: int
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.num_examples


def expect(keys: Mapping[str, Any]) -> Expected | None:
    """What `config.data` describes; None where only opening the source can tell."""
    split, known = keys["split"], _known(keys)
    try:
        spec, name = _spec(keys["pp"]), parse_split(split)[0]
    except UserError:
        return None
    if known is None or spec is None:
        return None
    num_classes, splits = known
    if name not in splits:
        return None
    return Expected(spec, len(split_range(split, splits[name])), num_classes)


def _known(keys: Mapping[str, Any]) -> tuple[int, Mapping[str, int]] | None:
    args = keys["args"]
    if keys["source"] == "tfds":
        return KNOWN.get(keys["name"].partition(":")[0].partition("/")[0])
    if keys["source"] == "fake" and args.get("encoded"):
        count = args.get("num_examples", 1024)
        return args.get("num_classes", 10), {parse_split(keys["split"])[0]: count}
    return None


def _spec(pp: str) -> Mapping[str, ArraySpec] | None:
    """The arrays that a preprocessing string makes of an encoded image and a label, if it tells."""
    fields: _Fields = {"image": ((None, None, 3), np.uint8), "label": ((), np.int32)}
    for node in operands(pp):
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        try:
            args = [ast.literal_eval(argument) for argument in call.args]
            kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        except ValueError:
            return None
        after = _after(getattr(call.func, "id", ""), fields, args, kwargs)
        if after is None:
            return None
        fields = after
    if any(None in shape for shape, _ in fields.values()):
        return None
    return {name: ArraySpec(shape, np.dtype(dtype)) for name, (shape, dtype) in fields.items()}


def _after(name: str, fields: _Fields, args: list, kwargs: dict[str, Any]) -> _Fields | None:
    """The fields after one op; None for an op, or a use of it, that is not followed."""
    if name in _RECORD_OPS:
        return _RECORD_OPS[name](fields, *args, **kwargs)
    key = kwargs.get("outkey", kwargs.get("key", "image"))
    if key != kwargs.get("inkey", key) or key not in fields:
        return None
    shape, dtype = fields[key]
    if name in _TO_SIZE:
        size = kwargs.get("size", kwargs.get("crop_size", args[0] if args else None))
        sides = (size, size) if isinstance(size, int) else size
        shape = (*(sides or (None, None)), shape[-1])
    elif name == "decode":
        shape = (*shape[:2], args[0] if args else kwargs.get("channels", 3))
    elif name in ("value_range", "vgg_value_range"):
        dtype = np.float32
    elif name in ("resize_small", "resize_long"):
        shape = (None, None, shape[-1])
    elif name not in _SAME:
        return None
    return fields | {key: (shape, dtype)}


def _onehot(
    fields: _Fields, depth: int, key: str = "labels", key_result: str | None = None, **_: Any
) -> _Fields:
    return fields | {key_result or key: ((depth,), np.float32)}


def _keep(fields: _Fields, *keys: str) -> _Fields:
    return {key: fields[key] for key in keys if key in fields}


def _drop(fields: _Fields, *keys: str) -> _Fields:
    return {key: field for key, field in fields.items() if key not in keys}


_RECORD_OPS: Mapping[str, Callable[..., _Fields]] = {
    "onehot": _onehot,
    "keep": _keep,
    "drop": _drop,
}
