"""Operations on batches of images on the device: normalize, distort, mix, erase."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from vit_jax.errors import UserError
from vit_jax.plugins import check_known
from vit_jax.types import Array


def normalize(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Returns uint8 images as float32 `(x - mean) / std`.

    Float images pass unchanged: a pipeline that sends floats has set the range itself.

    Args:
      images: `[..., c]`, such as images `[b, h, w, c]` or crops `[b, crops, h, w, c]`.
      mean, std: in 0..255, one value or one for each channel.
    """
    if images.dtype != jnp.uint8:
        return images
    shift, scale = _statistics(images.ndim, mean, std)
    return (images.astype(jnp.float32) - shift) / scale


def denormalize(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Returns images that `normalize` made of uint8, as uint8 again: rounded, within 0..255."""
    shift, scale = _statistics(images.ndim, mean, std)
    return jnp.clip(jnp.round(images * scale + shift), 0, 255).astype(jnp.uint8)


def _statistics(ndim: int, *values: tuple[float, ...]) -> list[Array]:
    shape = (*(1,) * (ndim - 1), -1)
    return [jnp.asarray(x, jnp.float32).reshape(shape) for x in values]


NO_LABEL = 255
"""The value of a pixel without a label in maps of labels."""

AFFINE_KEYS = ("rotate", "shift", "scale", "shear")
ELASTIC_KEYS = ("deviation", "grid")


def check_affine(bounds: Mapping[str, float]) -> None:
    """Raises a `UserError` unless `config.task.affine` holds bounds of `draw_affine`."""
    for name, bound in bounds.items():
        check_known(name, AFFINE_KEYS, f"config.task.affine.{name}")
        if isinstance(bound, bool) or not isinstance(bound, int | float) or bound < 0:
            raise UserError(f"config.task.affine.{name}={bound!r}: write a number of at least 0")


def check_elastic(fields: Mapping[str, float]) -> None:
    """Raises a `UserError` unless `config.task.elastic` holds arguments of `draw_elastic`."""
    for name, value in fields.items():
        check_known(name, ELASTIC_KEYS, f"config.task.elastic.{name}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise UserError(f"config.task.elastic.{name}={value!r}: write a number of at least 0")
    grid = fields.get("grid", 3)
    if not isinstance(grid, int) or grid < 2:
        raise UserError(f"config.task.elastic.grid={grid!r}: write a whole number from 2")
    if fields and "deviation" not in fields:
        raise UserError("config.task.elastic has no deviation: write the size of a displacement")


def random_affine(key: Array, images: Array, **bounds: float) -> Array:
    """Returns `images` `[b, h, w, c]` with small random distortions; see `draw_affine`."""
    return distort(images, draw_affine(key, len(images), **bounds))


def draw_affine(
    key: Array,
    batch: int,
    *,
    rotate: float = 0.0,
    shift: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
) -> Array:
    """Returns random `amounts` of `affine`, float32 `[batch, 5]`.

    The preprocessing op `random_affine` does the same on the host; on the device it costs four
    reads for each pixel.

    Args:
      key: for all random numbers.
      batch: the number of images.
      rotate: the largest angle in degrees, in both directions.
      shift: the largest translation along each axis, as a fraction of the side.
      scale: the largest relative magnification or, equally likely, reduction.
      shear: the largest horizontal shear angle in degrees, in both directions.
    """
    bounds = (math.radians(rotate), math.radians(shear), math.log1p(scale), shift, shift)
    draws = jax.random.uniform(key, (batch, len(bounds)), minval=-1.0, maxval=1.0)
    return draws * jnp.array([bounds])


def draw_elastic(
    key: Array, batch: int, shape: Sequence[int], *, deviation: float, grid: float = 3
) -> Array:
    """Returns random smooth displacements of pixels, float32 `[batch, 2, height, width]`.

    The displacements at the points of a coarse grid over the image are normal and independent;
    those of the pixels between are interpolated by cubic splines (Ronneberger et al. 2015, U-Net,
    section 3.1; the idea is of Simard et al. 2003).

    Args:
      key: for all random numbers.
      batch: the number of images.
      shape: (height, width) of the images.
      deviation: the standard deviation at a point of the grid, as a fraction of the side.
      grid: the number of points along each side, a whole number from 2.
    """
    side = int(grid)
    nodes = deviation * jax.random.normal(key, (batch, 2, side, side))
    fields = jax.image.resize(nodes, (batch, 2, *shape), "cubic")
    return fields * jnp.asarray(shape, jnp.float32).reshape(1, 2, 1, 1)


def distort(images: Array, amounts: Array, fields: Array | None = None) -> Array:
    """Returns `affine` of each image `[b, h, w, c]`, in the dtype of the images.

    `fields` are displacements as from `draw_elastic`, added to the places that are read.
    """
    given = (amounts,) if fields is None else (amounts, fields)
    moved = jax.vmap(affine)(images.astype(jnp.float32), *given)
    is_integer = jnp.issubdtype(images.dtype, jnp.integer)
    return (jnp.round(moved) if is_integer else moved).astype(images.dtype)


def distort_labels(maps: Array, amounts: Array, fields: Array | None = None) -> Array:
    """Returns maps of labels `[b, h, w]`, moved as `distort` moves images.

    Each pixel gets the label of the nearest one, and `NO_LABEL` from outside.
    """

    def of_image(labels: Array, *given: Array) -> Array:
        source = _sources(labels.shape, *given)
        return map_coordinates(labels, source, order=0, cval=NO_LABEL)

    return jax.vmap(of_image)(maps, *((amounts,) if fields is None else (amounts, fields)))


def affine(image: Array, amounts: Array, field: Array | None = None) -> Array:
    """Returns `image` `[h, w, c]` sheared, turned, scaled and moved about its center.

    Pixels are interpolated bilinearly; those from outside are zero.

    Args:
      image: floats.
      amounts: angle and slant (radians), logarithm of the magnification, shifts along x and y
        (fractions of the side): float32 `[5]`.
      field: further displacements along rows and columns, in pixels: float32 `[2, h, w]`.
    """
    source = _sources(image.shape[:2], amounts, field)
    sample = jax.vmap(lambda plane: map_coordinates(plane, source, order=1), -1, -1)
    return sample(image)


def _sources(shape: Sequence[int], amounts: Array, field: Array | None = None) -> list[Array]:
    """Returns the row and the column, `[h, w]` each, at which `affine` reads each pixel."""
    angle, slant, log_scale, shift_x, shift_y = amounts
    height, width = shape
    center_y, center_x = (height - 1) / 2, (width - 1) / 2
    rows, columns = jnp.mgrid[:height, :width]
    y = rows - center_y - shift_y * height
    x = columns - center_x - shift_x * width
    # Shear, then turn and scale.
    cos, sin = jnp.cos(angle) * jnp.exp(-log_scale), jnp.sin(angle) * jnp.exp(-log_scale)
    x = x + jnp.tan(slant) * y
    places = [center_y + sin * x + cos * y, center_x + cos * x - sin * y]
    return places if field is None else [places[0] + field[0], places[1] + field[1]]


def is_map(target: Array, images: Array) -> bool:
    """Returns whether a target of `images` `[b, h, w, c]` has a label for each pixel."""
    return target.shape == images.shape[:3]


def mixup(key: Array, alpha: float, *trees: Any, groups: int = 1) -> tuple[Any, ...]:
    """Returns convex mixes of each example with its neighbor in the batch (Zhang et al. 2018).

    Equation 1 of the paper, with one coefficient for each group, from Beta(alpha, alpha) reflected
    to at least 0.5, so that an example stays mostly itself. The partner is the previous row of the
    global batch, cyclically: a roll moves one row between devices where a random pairing would
    gather the batch.

    Args:
      key: for all random numbers.
      alpha: the parameter of the Beta distribution.
      *trees: arrays, or trees of arrays, whose leading axis is the batch.
      groups: the number of equal parts of the batch that draw a coefficient each.
    """
    coefficient = jax.random.beta(key, alpha, alpha, _draws(groups))
    return mix(jnp.maximum(coefficient, 1 - coefficient), *trees)


def mix(coefficient: Array, *trees: Any) -> tuple[Any, ...]:
    """Returns `a·x + (1 - a)·roll(x)` for every array x; a is `[]`, or `[groups]`."""

    def mixed(x: Array) -> Array:
        a = by_row(coefficient, x)
        return a * x + (1 - a) * jnp.roll(x, 1, axis=0)

    return jax.tree.map(mixed, trees)


def by_row(values: Array, x: Array) -> Array:
    """Returns a value for each row of `x`, ready to broadcast, from `[]`, or one for each group."""
    if not values.ndim:
        return values
    rows = jnp.repeat(values, len(x) // len(values), total_repeat_length=len(x))
    return rows.reshape(-1, *(1,) * (x.ndim - 1))


def _draws(groups: int) -> tuple[int, ...]:
    return () if groups == 1 else (groups,)


def cutmix(
    key: Array, alpha: float, images: Array, targets: Any, *, groups: int = 1
) -> tuple[Array, Any]:
    """Returns images with one box of their neighbor's pasted in (Yun et al. 2019, section 3.1).

    There is one box for each group; its share of the area is 1 - Beta(alpha, alpha) before it is
    clipped at the border. Targets are mixed by area, except maps of labels, which are pasted.

    Args:
      key: for all random numbers.
      alpha: the parameter of the Beta distribution.
      images: `[b, h, w, c]`.
      targets: an array, or a tree of arrays, whose leading axis is the batch.
      groups: the number of equal parts of the batch that draw a box each.
    """
    height, width = images.shape[1:3]
    key_area, key_y, key_x = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(key_area, alpha, alpha, _draws(groups)))
    inside_y = _interval(key_y, side, height)
    inside_x = _interval(key_x, side, width)
    box = inside_y[..., :, None] & inside_x[..., None, :]
    share = box.mean((-2, -1), dtype=jnp.float32)
    boxes = box[None] if groups == 1 else jnp.repeat(box, len(images) // groups, axis=0)

    def mixed(target: Array) -> Array:
        neighbors = jnp.roll(target, 1, axis=0)
        if is_map(target, images):
            return jnp.where(boxes, neighbors, target)
        by = by_row(share, target)
        return (1 - by) * target + by * neighbors

    pasted = jnp.where(boxes[..., None], jnp.roll(images, 1, axis=0), images)
    return pasted, jax.tree.map(mixed, targets)


def erase(key: Array, probability: float, images: Array) -> Array:
    """Returns images of which some have noise in place of one box (Zhong et al. 2020).

    Algorithm 1 of the paper, as DeiT runs it: the box takes 2 % to a third of the image, its
    aspect ratio is log-uniform from 0.3 to 1 / 0.3, the noise is standard normal. Ten boxes are
    drawn for each image, and the first that fits is used; where none fits, the image stays whole.

    Args:
      key: for all random numbers.
      probability: of a box, for each image on its own.
      images: normalized, `[b, h, w, c]`.
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
    """Returns a mask of the `size` cells that lie within `share·size / 2` of a uniform center.

    share: `[]` or `[groups]`; the mask has another axis of `size`.
    """
    center = jax.random.uniform(key, share.shape, maxval=size)[..., None]
    cells = jnp.arange(size).reshape((1,) * share.ndim + (size,)) + 0.5
    return jnp.abs(cells - center) < share[..., None] * size / 2
