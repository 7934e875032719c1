"""What tasks do to images on the device: normalising, distorting, and mixing whole examples."""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.plugins import check_known
from vit_jax.types import Array, DataInfo


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """uint8 images → float32 `(x - mean) / std`, mean and std in 0..255, one or one a channel.

    Float images pass unchanged: a pipeline that sends floats has set the range itself.
    """
    if images.dtype != jnp.uint8:
        return images
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (mean, std))
    return (images.astype(jnp.float32) - mean) / std


AFFINE_KEYS = ("rotate", "shift", "scale", "shear")


def check_affine(bounds: Mapping[str, float]) -> None:
    """Raises a `UserError` where `config.task.affine` is not made of bounds of `random_affine`."""
    for name, bound in bounds.items():
        check_known(name, AFFINE_KEYS, f"config.task.affine.{name}")
        if isinstance(bound, bool) or not isinstance(bound, int | float) or bound < 0:
            raise UserError(f"config.task.affine.{name}={bound!r}: write a number of at least 0")


def random_affine(
    key: Array,
    images: Array,
    *,
    rotate: float = 0.0,
    shift: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
) -> Array:
    """Small random distortions about the centres of `images` `[b, h, w, c]`; zeros from outside.

    What the preprocessing op of this name does on the host, for hosts that have no time for it: it
    costs the device four reads a pixel. Pixels keep their dtype.

    rotate: largest angle, degrees, either way. shift: largest move along each axis, as a fraction
    of the side. scale: largest relative magnification and, as likely, reduction. shear: largest
    horizontal shear angle, degrees, either way.
    """
    bounds = (math.radians(rotate), math.radians(shear), math.log1p(scale), shift, shift)
    draws = jax.random.uniform(key, (len(images), len(bounds)), minval=-1.0, maxval=1.0)
    moved = jax.vmap(affine)(images.astype(jnp.float32), draws * jnp.array([bounds]))
    is_integer = jnp.issubdtype(images.dtype, jnp.integer)
    return (jnp.round(moved) if is_integer else moved).astype(images.dtype)


def affine(image: Array, amounts: Array) -> Array:
    """`image` `[h, w, c]` sheared, turned, scaled and moved about its centre, bilinear.

    amounts: angle and slant (radians), logarithm of the magnification, shifts along x and y
    (fractions of the side).
    """
    angle, slant, log_scale, shift_x, shift_y = amounts
    height, width = image.shape[:2]
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    rows, columns = jnp.mgrid[:height, :width]
    y = rows - centre_y - shift_y * height
    x = columns - centre_x - shift_x * width
    # Where the pixel at (x, y) is read from: shear, then turn and scale.
    cos, sin = jnp.cos(angle) * jnp.exp(-log_scale), jnp.sin(angle) * jnp.exp(-log_scale)
    x = x + jnp.tan(slant) * y
    source = [centre_y + sin * x + cos * y, centre_x + cos * x - sin * y]
    sample = jax.vmap(lambda plane: map_coordinates(plane, source, order=1), -1, -1)
    return sample(image)


def mixup(key: Array, alpha: float, *arrays: Array) -> tuple[Array, ...]:
    """Convex mixes of each example with its neighbour in the batch (Zhang et al. 2018, eq. 1).

    One coefficient a batch, from Beta(alpha, alpha) reflected to at least 0.5, so that an example
    stays mostly itself. The partner is the previous row of the global batch, cyclically: a roll
    moves one row between devices where a random pairing would gather the batch.
    """
    coefficient = jax.random.beta(key, alpha, alpha)
    return mix(jnp.maximum(coefficient, 1 - coefficient), *arrays)


def mix(coefficient: Array, *arrays: Array) -> tuple[Array, ...]:
    """`a·x + (1 - a)·roll(x)` for every array."""
    return tuple(coefficient * x + (1 - coefficient) * jnp.roll(x, 1, axis=0) for x in arrays)


def cutmix(key: Array, alpha: float, images: Array, labels: Array) -> tuple[Array, Array]:
    """Pastes one box of the neighbour's image; labels mix by area (Yun et al. 2019, section 3.1).

    One box a batch; its area share is 1 - Beta(alpha, alpha) before clipping at the border.
    """
    height, width = images.shape[1:3]
    key_area, key_y, key_x = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(key_area, alpha, alpha))
    inside_y = _interval(key_y, side, height)
    inside_x = _interval(key_x, side, width)
    box = inside_y[:, None] & inside_x[None, :]
    mixed = jnp.where(box[None, :, :, None], jnp.roll(images, 1, axis=0), images)
    share = box.mean(dtype=jnp.float32)
    return mixed, (1 - share) * labels + share * jnp.roll(labels, 1, axis=0)


def erase(key: Array, probability: float, images: Array) -> Array:
    """Replaces one box of some images by standard normal noise (Zhong et al. 2020, algorithm 1).

    As DeiT has it: the box takes 2 % to a third of the image, its aspect ratio is log-uniform from
    0.3 to 1 / 0.3. Of ten boxes drawn the first that fits is used; where none does, nothing is.

    images: normalised `[b, h, w, c]`; each is erased, on its own, with `probability`.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 6)
    area = jax.random.uniform(keys[0], (batch, 10), minval=0.02, maxval=1 / 3) * height * width
    ratio = jnp.exp(jax.random.uniform(keys[1], (batch, 10), minval=-1.0) * jnp.log(1 / 0.3))
    tall, wide = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    tall, wide = (jnp.take_along_axis(side, first, axis=1) for side in (tall, wide))
    top = jnp.floor(jax.random.uniform(keys[2], (batch, 1)) * (height - tall + 1))
    left = jnp.floor(jax.random.uniform(keys[3], (batch, 1)) * (width - wide + 1))
    rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
    inside_y = (rows >= top) & (rows < top + tall)
    inside_x = (columns >= left) & (columns < left + wide)
    chosen = jax.random.bernoulli(keys[4], probability, (batch,)) & fits.any(1)
    box = chosen[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]
    noise = jax.random.normal(keys[5], images.shape, images.dtype)
    return jnp.where(box[..., None], noise, images)


def _interval(key: Array, share: Array, size: int) -> Array:
    """Mask of `size` cells: those within `share·size / 2` of a uniform centre."""
    centre = jax.random.uniform(key, maxval=size)
    cells = jnp.arange(size) + 0.5
    return jnp.abs(cells - centre) < share * size / 2


def check_data(task: str, wanted: Mapping[str, str], info: DataInfo, fits: bool) -> None:
    """Raises a `UserError` that shows what the task wants beside what the pipeline gives."""
    if not fits:
        given = {name: f"{s.dtype} {list(s.shape)}" for name, s in info.spec.items()}
        raise UserError(
            f"the data does not fit task {task}: it wants {dict(wanted)}, the pipeline"
            f" (config.data) gives {given}"
        )


def check_share(**values: float) -> None:
    """Raises a `UserError` unless each of `values`, keys of `config.task`, is from 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"config.task.{name}={value}: write a number from 0 to 1")


def check_not_negative(**values: float) -> None:
    """Raises a `UserError` where one of `values`, keys of `config.task`, is below 0."""
    for name, value in values.items():
        if value < 0:
            raise UserError(f"config.task.{name}={value}: write 0 or more")


def check_statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Raises a `UserError` where `normalise` cannot divide by `std`, or counts other channels."""
    for name, values in {"mean": mean, "std": std}.items():
        if len(values) not in (1, channels):
            raise UserError(
                f"config.task.{name} has {len(values)} numbers for {channels} channels; write one,"
                " or one a channel"
            )
    if min(std) <= 0:
        raise UserError(f"config.task.std={list(std)}: write positive numbers, in 0..255")


def check_geometry(model: nn.Module, shape: tuple[int, ...], crop_to_patches: bool) -> None:
    """Raises a `UserError` where patches do not tile `shape` `(h, w, c)` and nobody allowed it."""
    backbone = getattr(model, "backbone", model)
    stride = models.token_stride(backbone)
    if stride is None or crop_to_patches:
        return
    if shape[0] % stride[0] or shape[1] % stride[1]:
        raise UserError(
            f"config.model.patch_size={backbone.patch_size} does not divide the image of"
            f" {shape[0]}×{shape[1]} pixels into tokens of {stride[0]}×{stride[1]}; change"
            " config.data.pp's size, or drop the excess with"
            " --config.task.crop_to_patches=true"
        )
