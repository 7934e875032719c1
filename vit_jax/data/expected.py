"""Predicts the shapes of a config's batches without the data and without TensorFlow.

For planning: the datasets that the published recipes train on are known by name, and of a
preprocessing string only what it does to shapes and dtypes is followed.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.pp import VALUE_OPS, calls
from vit_jax.data.sources._splits import parse_split, split_range
from vit_jax.data.tokenizer import BYTES
from vit_jax.errors import UserError
from vit_jax.types import ArraySpec

_Fields = Mapping[str, ArraySpec]


def _array(dtype: Any, *shape: Any) -> ArraySpec:
    """Returns the spec of one array; None stands for a side that only the data can tell."""
    return ArraySpec(shape, np.dtype(dtype))


_LABEL: _Fields = types.MappingProxyType({"label": _array(np.int32)})


class Known(NamedTuple):
    """A published dataset: its classes, the examples of each split, its arrays beside the image.

    has_objects: whether the arrays of `vit_jax.data.boxes` come along too.
    """

    num_classes: int
    splits: Mapping[str, int]
    fields: _Fields = _LABEL
    has_objects: bool = False


_ENCODED_MASK = _array(object)
# As TFDS's catalogue has them, by the name with or without `/config`; imagenet21k as the AugReg
# models saw it (Steiner et al. 2022, section 3.1: 14,197,122 images of 21,841 classes; the label
# space of its builders has 21,843 entries).
KNOWN: Mapping[str, Known] = {
    "cifar10": Known(10, {"train": 50_000, "test": 10_000}),
    "cifar100": Known(100, {"train": 50_000, "test": 10_000}),
    "coco/2017": Known(80, {"train": 118_287, "validation": 5_000}, {}, has_objects=True),
    "coco_captions": Known(
        80,
        {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000},
        {"captions": _array(object, 5)},
        has_objects=True,
    ),
    "digits": Known(10, {"train": 1_437, "test": 360}),
    "imagenet2012": Known(1000, {"train": 1_281_167, "validation": 50_000}),
    "imagenet21k": Known(21_843, {"full": 14_197_122, "train": 14_197_122}),
    "oxford_flowers102": Known(102, {"train": 1_020, "validation": 1_020, "test": 6_149}),
    "oxford_iiit_pet": Known(
        37,
        {"train": 3_680, "test": 3_669},
        {**_LABEL, "segmentation_mask": _ENCODED_MASK},
    ),
    "scene_parse150": Known(0, {"train": 20_210, "test": 2_000}, {"annotation": _ENCODED_MASK}),
}
_MAX_OBJECTS = 100

_SAME = {
    "flip_lr",
    "randaug",
    "randaug_increasing",
    "random_affine",
    "color_jitter",
    "photometric_distortion",
    "three_augment",
    "grayscale",
    "solarize",
    "gaussian_blur",
}
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
    """Returns the source that `config.data` describes, or None if only opening it can tell.

    How often the examples of balanced classes occur depends on their labels.
    """
    split, known = keys["split"], _known(keys)
    if known is None or keys.get("balance"):
        return None
    try:
        spec, name = _spec(keys["pp"], records_of(known, keys["args"])), parse_split(split)[0]
    except UserError:
        return None
    if spec is None or name not in known.splits:
        return None
    return Expected(spec, len(split_range(split, known.splits[name])), known.num_classes)


def _known(keys: Mapping[str, Any]) -> Known | None:
    args = keys["args"]
    if keys["source"] == "tfds":
        name = keys["name"].partition(":")[0]
        return KNOWN.get(name) or KNOWN.get(name.partition("/")[0])
    if keys["source"] == "fake" and args.get("encoded"):
        count = args.get("num_examples", 1024)
        return Known(args.get("num_classes", 10), {parse_split(keys["split"])[0]: count})
    return None


def records_of(known: Known, args: Mapping[str, Any]) -> _Fields:
    """Returns the arrays of a record before any op."""
    fields = {"image": _array(np.uint8, None, None, 3), **known.fields}
    if known.has_objects:
        room = args.get("max_objects", _MAX_OBJECTS)
        fields |= {
            "boxes": _array(np.float32, room, 4),
            "box_label": _array(np.int32, room),
            "box_crowd": _array(np.bool_, room),
            "box_area": _array(np.float32, room),
        }
    return fields


def _spec(pp: str, fields: _Fields) -> _Fields | None:
    """The arrays that a preprocessing string makes of a record, if it tells."""
    for call in calls(pp):
        after = _after(call.name, fields, call.args, call.kwargs)
        if after is None:
            return None
        fields = after
    if any(None in array.shape for array in fields.values()):
        return None
    return fields


def _after(name: str, fields: _Fields, args: list, kwargs: dict[str, Any]) -> _Fields | None:
    """The fields after one op; None for an op, or a use of it, that is not followed."""
    if name in _RECORD_OPS:
        return _RECORD_OPS[name](fields, *args, **kwargs)
    key = kwargs.get("outkey", kwargs.get("key", "image"))
    if key != kwargs.get("inkey", key) or key not in fields:
        return None
    image = fields[key]
    if name in _TO_SIZE:
        size = kwargs.get("size", kwargs.get("crop_size", args[0] if args else None))
        image = _sized(image, size)
    elif name == "decode":
        channels = args[0] if args else kwargs.get("channels", 3)
        image = image._replace(shape=(*image.shape[:2], channels))
    elif name in VALUE_OPS:
        image = image._replace(dtype=np.dtype(np.float32))
    elif name in ("resize_small", "resize_long"):
        image = _sized(image, None)
    elif name not in _SAME:
        return None
    return {**fields, key: image}


def _sized(image: ArraySpec, size: int | Sequence[int] | None) -> ArraySpec:
    """An image of this side, or height and width; None: of sides that differ."""
    sides = (size, size) if isinstance(size, int) or size is None else size
    return image._replace(shape=(*sides, image.shape[-1]))


def _pictures_sized(fields: _Fields, size: int | Sequence[int] | None, **_: Any) -> _Fields:
    pictures = {"image", "segmentation"} & fields.keys()
    return {**fields, **{key: _sized(fields[key], size) for key in pictures}}


def _joint_decode(fields: _Fields, channels: int = 3) -> _Fields:
    found = {**fields, "image_size": _array(np.int32, 2)}
    found["image"] = _array(np.uint8, None, None, channels)
    if "segmentation" in fields:
        found["segmentation"] = _array(np.uint8, None, None, 1)
    return found


def _joint_fit(fields: _Fields, size: int | Sequence[int], **_: Any) -> _Fields:
    return {**_pictures_sized(fields, size), "content": _array(np.float32, 2)}


def _tokenize(
    fields: _Fields,
    length: int,
    vocab: str = BYTES,
    key: str = "caption",
    key_result: str = "tokens",
) -> _Fields:
    shape = (*fields[key].shape, length)
    return {**fields, key_result: ArraySpec(shape, np.dtype(np.int32), vocab)}


def _choose(fields: _Fields, key: str = "captions", key_result: str = "caption") -> _Fields:
    return {**fields, key_result: _array(object, *fields[key].shape[1:])}


def _onehot(
    fields: _Fields, depth: int, key: str = "labels", key_result: str | None = None, **_: Any
) -> _Fields:
    return {**fields, key_result or key: _array(np.float32, depth)}


def _copy(fields: _Fields, inkey: str, outkey: str) -> _Fields:
    return {**fields, outkey: fields[inkey]}


def _views(fields: _Fields, key_result: str, count: int, pp: str) -> _Fields | None:
    view: _Fields | None = fields
    for call in calls(pp):
        view = view and _after(call.name, view, call.args, call.kwargs)
    if view is None:
        return None
    image, there = view["image"], fields.get(key_result)
    count += there.shape[0] if there else 0
    return {**fields, key_result: image._replace(shape=(count, *image.shape))}


def _keep(fields: _Fields, *keys: str) -> _Fields:
    return {key: fields[key] for key in keys if key in fields}


def _drop(fields: _Fields, *keys: str) -> _Fields:
    return {key: field for key, field in fields.items() if key not in keys}


def _same(fields: _Fields, *_: Any, **__: Any) -> _Fields:
    return fields


_RECORD_OPS: Mapping[str, Callable[..., _Fields | None]] = {
    "check_segmentation": _same,
    "choose": _choose,
    "copy": _copy,
    "drop": _drop,
    "joint_crop": _pictures_sized,
    "joint_decode": _joint_decode,
    "joint_fit": _joint_fit,
    "joint_flip_lr": _same,
    "joint_resize": _pictures_sized,
    "joint_resize_small": lambda fields, *_, **__: _pictures_sized(fields, None),
    "joint_scale": _same,
    "keep": _keep,
    "lower": _same,
    "map_labels": _same,
    "onehot": _onehot,
    "shift_labels": _same,
    "tokenize": _tokenize,
    "views": _views,
}
