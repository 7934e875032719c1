"""RandAugment on the device, for hosts with too few cores to do it (Cubuk et al. 2020).

The 16 operations of the preprocessing op `randaug`, with its strengths and oddities, for a whole
batch at once. Each image draws its own operations. All images go through the same few passes and
keep the results that they drew: a table of 256 values for operations that look at one pixel, one
warp for those that move pixels, and two blends. Strengths are known before compiling, so NumPy
computes tables and matrices.

The random draws differ from the host's, but each operation equals the host's to the bit. A recipe
needs only the same distribution; the bits are kept because they cost little (two roundings that
the code spells out, `gathers.product` and `_fused`) and make the tests simple and sharp: goldens
recorded from the published code decide, on every kind of device.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.augment import strengths
from vit_jax.augment.gathers import count, look_up, num_phases, product, warp
from vit_jax.augment.strengths import FILL, OPERATIONS, STRONGEST
from vit_jax.errors import UserError
from vit_jax.plugins import check_known
from vit_jax.types import Array, ArraySpec

KEYS = ("num_layers", "magnitude", "corrected")


def check(fields: Mapping[str, Any], image: ArraySpec) -> None:
    """Raises a `UserError` if `config.task.randaug` or the images do not suit `augment`."""
    if not hasattr(fields, "items"):
        raise UserError(f"config.task.randaug={fields!r}: set one of its keys, {', '.join(KEYS)}")
    for name, value in fields.items():
        check_known(name, KEYS, f"config.task.randaug.{name}")
        if name == "corrected" and not isinstance(value, bool):
            raise UserError(f"config.task.randaug.corrected={value!r}: write true or false")
        if name == "num_layers" and (type(value) is not int or value < 1):
            raise UserError(f"config.task.randaug.num_layers={value!r}: write 1 or more")
        if name == "magnitude" and (type(value) not in (int, float) or not 0 <= value <= STRONGEST):
            raise UserError(
                f"config.task.randaug.magnitude={value!r}: write a number from 0 to {STRONGEST:g}"
            )
    if fields and (image.dtype != np.uint8 or image.shape[-1] != 3):
        raise UserError(
            f"config.task.randaug needs uint8 images of 3 channels, not {image.dtype}"
            f" {list(image.shape)}: leave value_range out of config.data.pp, the task normalizes"
        )


def augment(
    key: Array,
    images: Array,
    *,
    num_layers: int = 2,
    magnitude: float = 10.0,
    corrected: bool = False,
) -> Array:
    """Returns `images` after `num_layers` operations, drawn for each image on its own.

    Args:
      key: for all random numbers.
      images: uint8 `[b, h, w, 3]`.
      num_layers: operations on each image, one after the other.
      magnitude: the strength of all operations, 0 to `STRONGEST`.
      corrected: removes three oddities of the published runs; see `strengths`.
    """

    def layer(images: Array, draws: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return apply(images, *draws, magnitude=magnitude, corrected=corrected), None

    # Two warps in a row could be composed into one with the same bits. They are not: a gather is
    # cheap where there are no TPUs, and on TPUs only a single warp is two products.
    return jax.lax.scan(layer, images, draw(key, num_layers, images.shape))[0]


def draw(key: Array, num_layers: int, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Returns `operation`, `negative` and `place` of `apply` for each layer, `[num_layers, b, …]`.

    Args:
      key: for all random numbers.
      num_layers: the number of layers.
      shape: the shape of the images, `[b, h, w, 3]`.
    """
    key_operation, key_sign, key_place = jax.random.split(key, 3)
    drawn, size = (num_layers, shape[0]), jnp.array([[shape[1:3]]], jnp.float32)
    return (
        jax.random.randint(key_operation, drawn, 0, len(OPERATIONS)),
        jax.random.bernoulli(key_sign, shape=drawn).astype(jnp.int32),
        jax.random.uniform(key_place, (*drawn, 2)) * size,
    )


def apply(
    images: Array,
    operation: Array,
    negative: Array,
    place: Array,
    *,
    magnitude: float,
    corrected: bool = False,
) -> Array:
    """Returns `images` after one operation on each.

    Args:
      images: uint8 `[b, h, w, 3]`.
      operation: numbers in `OPERATIONS`, int32 `[b]`.
      negative: 1 where the strength of a geometric operation is negative, else 0, int32 `[b]`.
      place: row and column of the center of Cutout's square, float32 `[b, 2]`.
      magnitude, corrected: see `augment`.
    """
    level, size = magnitude / 10.0, images.shape[1:3]
    enhance = strengths.enhancement(level)
    matrices = strengths.matrices(level, size, corrected)
    is_moved = (matrices != strengths.IDENTITY).any((1, 2, 3))

    def chosen(*names: str) -> Array:
        wanted = np.isin(OPERATIONS, names)
        return jnp.asarray(wanted)[operation][:, None, None, None]

    pixels = images.astype(jnp.float32)
    grey = _grey(images)
    tables = _tables(operation, images, grey, level, corrected)
    moved = warp(images, jnp.asarray(matrices)[operation, negative], num_phases(matrices))
    hidden = _hidden(place, strengths.half_side(level, size[0], corrected), size)
    result = look_up(tables, images)
    result = jnp.where(chosen("Color"), _blend(grey, pixels, enhance), result)
    result = jnp.where(chosen("Sharpness"), _blend(_smooth(pixels), pixels, enhance), result)
    result = jnp.where(chosen("Cutout") & hidden, FILL, result)
    return jnp.where(chosen(*np.array(OPERATIONS)[is_moved]), moved, result)


# Arithmetic that rounds as on the host.


def _blend(start: Array, pixels: Array, factor: np.float32) -> Array:
    """Returns uint8 from `start` (factor 0) to `pixels` (1) and beyond; truncated, not rounded."""
    return _to_uint8(start + product(pixels - start, factor))


def _to_uint8(values: Array) -> Array:
    return jnp.clip(values, 0.0, 255.0).astype(jnp.uint8)


# Operations that look at one pixel: tables.


def _tables(operation: Array, images: Array, grey: Array, level: float, corrected: bool) -> Array:
    """Returns the new value of each value, uint8 `[b, 256, 3]`; itself for other operations."""
    counts = count(images)
    of_image = {"AutoContrast": _auto_contrast(counts), "Equalize": _equalize(counts)}
    if corrected:
        of_image["Contrast"] = _contrast(grey, strengths.enhancement(level))
    fixed = jnp.asarray(strengths.fixed_tables(level, images.shape[1:3], corrected))[operation]
    drawn = [(operation == OPERATIONS.index(name))[:, None, None] for name in of_image]
    return jnp.select(drawn, list(of_image.values()), fixed[..., None])


def _auto_contrast(counts: Array) -> Array:
    """Returns tables that stretch each channel to 0..255; a channel of one value stays."""
    occurs = counts > 0
    low, high = jnp.argmax(occurs, 1), 255 - jnp.argmax(occurs[:, ::-1], 1)
    # The quotients are NumPy's, because not every accelerator divides exactly.
    scales = np.float32(255) / np.maximum(np.arange(256, dtype=np.float32), 1)
    scale = jnp.asarray(scales)[high - low][:, None]
    values = jnp.arange(256.0)[None, :, None]
    offset = product(low[:, None].astype(jnp.float32), scale)
    stretched = _to_uint8(product(values, scale) - offset)
    return jnp.where((high > low)[:, None], stretched, values.astype(jnp.uint8))


def _equalize(counts: Array) -> Array:
    """Returns tables that make all values of each channel occur about equally often."""
    below = jnp.cumsum(counts, 1) - counts
    highest = 255 - jnp.argmax((counts > 0)[:, ::-1], 1, keepdims=True)
    step = jnp.take_along_axis(below, highest, 1) // 255
    at_least_one = jnp.maximum(step, 1)
    table = jnp.minimum((below + at_least_one // 2) // at_least_one, 255)
    values = jnp.arange(256)[None, :, None]
    return jnp.where(step == 0, values, table * (values > 0)).astype(jnp.uint8)


def _contrast(grey: Array, factor: np.float32) -> Array:
    """Returns tables that move values away from the mean gray of the image."""
    mean = grey.mean((1, 2, 3))[:, None, None]
    return _blend(mean, jnp.arange(256.0)[None, :, None], factor)


def _grey(images: Array) -> Array:
    """Returns the truncated luma, whole numbers in float32 `[b, h, w, 1]`.

    It is rounded as TensorFlow does, which computes in 0..1 and multiplies by 255.5 at the end.
    """
    channels = product(images.astype(jnp.float32), np.float32(1 / 255))
    weighted = product(channels, np.array([[[[0.2989, 0.587, 0.114]]]], np.float32))
    luma = weighted[..., :1] + weighted[..., 1:2] + weighted[..., 2:]
    return jnp.floor(luma * np.float32(255.5))


# Operations that read the neighbors of a pixel, or hide it.


def _smooth(pixels: Array) -> Array:
    """Returns the filter [1 1 1; 1 5 1; 1 1 1] / 13, truncated; the border stays as it is.

    Products are summed in the order of the published runs, and by fused multiply-adds as there:
    where the sum is a multiple of 13, the rounding decides to which number it is truncated.
    """
    height, width = pixels.shape[1:3]
    padded = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = jnp.zeros_like(pixels)
    for row in range(3):
        for column in range(3):
            window = padded[:, row : row + height, column : column + width]
            total = _fused(total, window, np.float32((5 if row == column == 1 else 1) / 13))
    inner = np.pad(np.ones((height - 2, width - 2), bool), 1)[None, :, :, None]
    return jnp.where(inner, jnp.floor(total), pixels)


def _fused(total: Array, pixels: Array, weight: np.float32) -> Array:
    """Returns `total + pixels * weight`, rounded once, with or without such an instruction.

    The two parts of the weight have exact products with pixels. The rounding error of the first sum
    (Knuth's two-sum) and the second product are then added, again exactly.
    """
    coarse = np.float32(np.round(weight * 2**12) / 2**12)
    large, small = pixels * coarse, pixels * (weight - coarse)
    rounded = total + large
    added = rounded - total
    lost = (total - (rounded - added)) + (large - added)
    return rounded + (lost + small)


def _hidden(place: Array, half_side: int, size: Sequence[int]) -> Array:
    """Returns Cutout's square of side `2 * half_side` about `place`, bool `[b, h, w, 1]`."""

    def near(axis: int) -> Array:
        offset = jnp.arange(size[axis])[None] - place[:, axis, None].astype(jnp.int32)
        return (offset >= -half_side) & (offset < half_side)

    return (near(0)[:, :, None] & near(1)[:, None, :])[..., None]
