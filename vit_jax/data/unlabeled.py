"""Preprocessing of images without labels, such as the files that a user passes to a trained model.

A file must be prepared exactly as evaluation prepares the images of its dataset. Therefore the same
preprocessing string is used, without those ops that need a field that a file does not have.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import pp as preprocessing
from vit_jax.data.ops import MissingField
from vit_jax.data.placement import Placement
from vit_jax.errors import UserError

# Added to coordinates, to distinguish them from the padding that preprocessing adds to an image.
_OFFSET = 4096.0
_IS_COORDINATE = _OFFSET / 2


class ImagePart(NamedTuple):
    """The part of a preprocessing string that applies to images without labels.

    Attributes:
      text: the part, as a preprocessing string whose input is encoded images.
      is_sized: whether images of any size are brought to one size. If not, only images of equal
        size form a batch, and files must be resized before preprocessing.
    """

    text: str
    is_sized: bool


@functools.cache
def image_part(pp: str, channels: int) -> ImagePart:
    """Returns the part of a preprocessing string that applies to images without labels.

    Args:
      channels: the channels of the images, used if the string does not decode because its dataset
        has decoded images.

    Raises:
      UserError: the string cannot be parsed, or does not fit images.
    """
    from vit_jax.data.host_tensorflow import tf

    if not pp.strip():
        return ImagePart("", is_sized=False)
    steps = preprocessing.parse(pp)
    if not any("decode" in step.op.name for step in steps):
        steps = [*preprocessing.parse(f"decode({channels})"), *steps]
    kept: list[str] = []

    def trace(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        record = {"image": image}
        for written in steps:
            step = _limited(written, record)
            try:
                record = preprocessing.apply_step(step, record, iter([seed]))
            except MissingField:
                continue
            record = {key: _made(x) for key, x in record.items()}
            kept.append(step.text)
        return record["image"]

    signature = [tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int32)]
    traced = tf.function(trace, input_signature=signature, autograph=False)
    shape = traced.get_concrete_function().output_shapes
    return ImagePart("|".join(kept), is_sized=shape.is_fully_defined())


def _limited(step: preprocessing.Step, record: dict[str, Any]) -> preprocessing.Step:
    """Returns an op such as `keep`, which takes any number of fields, for the existing fields."""
    keys = step.arguments.arguments.get("keys")
    if not isinstance(keys, tuple) or all(key in record for key in keys):
        return step
    there = ", ".join(repr(key) for key in keys if key in record)
    return preprocessing.parse(f"{step.op.name}({there})")[0]


def _made(x: Any) -> Any:
    return x.apply_alone() if isinstance(x, preprocessing.Batched) else x


def placement(part: ImagePart, size: tuple[int, int], seed: np.ndarray) -> Placement | None:
    """Returns the position of the prepared image of a file in the file.

    It is found by preparing images whose pixels contain their own coordinates, so it is correct for
    all ops that move pixels.

    Args:
      size: (height, width) of the file's image.
      seed: the key of the example, int32 `[2]`.

    Returns:
      None if the prepared image is not a scaled part of the file, for example after a rotation.
    """
    geometry = "|".join(
        step.text
        for step in preprocessing.parse(part.text)
        if step.op.name not in preprocessing.VALUE_OPS
    )
    try:
        maps = [_prepared(geometry, size, axis, seed) for axis in (0, 1)]
    except UserError:  # An op accepts only bytes or three colors, so it cannot map coordinates.
        return None
    seen = (maps[0] > _IS_COORDINATE) & (maps[1] > _IS_COORDINATE)
    down, across = (_line(coordinates, seen, axis) for axis, coordinates in enumerate(maps))
    if down is None or across is None:
        return None
    return Placement((down[0], across[0]), (down[1], across[1]), size)


def _prepared(geometry: str, size: tuple[int, int], axis: int, seed: np.ndarray) -> np.ndarray:
    """Preprocesses an image whose pixels hold the centers of their rows or columns."""
    from vit_jax.data.host_tensorflow import tf

    centers = np.arange(size[axis], dtype=np.float32) + 0.5 + _OFFSET
    ramp = np.broadcast_to(centers[:, None] if axis == 0 else centers[None], size)[..., None]
    record = preprocessing.build(geometry)({"image": tf.constant(ramp)}, tf.constant(seed))
    return record["image"].numpy()[..., 0]


def _line(coordinates: np.ndarray, seen: np.ndarray, axis: int) -> tuple[float, float] | None:
    """Returns (scale, origin) of the coordinates along an axis; None if they are not linear.

    Only the middle half is used, because resizing repeats the outermost pixels of an image.
    """
    if axis == 1:
        coordinates, seen = coordinates.T, seen.T
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if len(rows) < 2:
        return None
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    if not seen[part].all():
        return None
    margin = len(rows) // 4
    middle = slice(margin, len(rows) - margin)
    values = coordinates[part][middle].astype(np.float64) - _OFFSET
    centers = (rows[0] + np.arange(len(rows)) + 0.5)[middle]
    scale, origin = np.polyfit(centers, values.mean(1), 1)
    off = np.abs(values - (scale * centers + origin)[:, None]).max()
    # Resizing to the nearest pixel is off by up to half a pixel, of the file or of the result.
    if abs(scale) < 1e-3 or off > max(1.0, abs(scale)):
        return None
    return float(scale), float(origin)
