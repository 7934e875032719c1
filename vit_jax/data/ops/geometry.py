"""Resizing, cropping, flipping and small affine distortions.

Sizes are one integer for a square, or (height, width). Pixels keep their dtype: the results of
float computations on uint8 images are clipped to 0..255 and truncated, as in the published
pipelines of TensorFlow; those of PyTorch, by Pillow, round. (Bicubic interpolation overshoots at
edges.)
"""

import math
from collections.abc import Callable

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import image_op, random_image_op
from vit_jax.errors import UserError, nearest

Size = int | tuple[int, int]

SAMPLERS = ("tensorflow", "torchvision", "flax")

MEANS = ("nearest", "bilinear", "area")
"""The methods of `resize` whose results lie between pixels of the image."""

MAX_SIDE = 65_535.0
"""The longest side, in pixels, that keeping an aspect ratio may give."""


@image_op
def resize(
    image: tf.Tensor, size: Size, method: str = "bilinear", antialias: bool = False
) -> tf.Tensor:
    """Resizes to exactly `size`, changing the aspect ratio if necessary.

    Without `antialias`, bilinear and bicubic interpolation read only the nearest source pixels, so
    a strong reduction aliases. Published big_vision models were trained and evaluated this way.
    """
    return _resized(image, _pair(size), method, antialias)


@image_op
def resize_small(
    image: tf.Tensor, smaller_size: int, method: str = "area", antialias: bool = False
) -> tf.Tensor:
    """Resizes so that the shorter side is `smaller_size`, keeping the aspect ratio."""
    return _scaled(image, smaller_size, tf.minimum, method, antialias)


@image_op
def resize_long(
    image: tf.Tensor, longer_size: int, method: str = "area", antialias: bool = False
) -> tf.Tensor:
    """Resizes so that the longer side is `longer_size`, keeping the aspect ratio."""
    return _scaled(image, longer_size, tf.maximum, method, antialias)


@image_op
def central_crop(
    image: tf.Tensor, crop_size: Size | None = None, *, share: float = 1.0
) -> tf.Tensor:
    """Crops the center of the image; without a size, a square of `share` of the shorter side."""
    height, width = tf.unstack(tf.shape(image)[:2])
    if crop_size is None:
        shorter = tf.cast(tf.minimum(height, width), tf.float32)
        crop_height = crop_width = tf.cast(tf.maximum(1.0, share * shorter), tf.int32)
    else:
        crop_height, crop_width = _pair(crop_size)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return tf.image.crop_to_bounding_box(image, top, left, crop_height, crop_width)


@random_image_op
def random_crop(
    image: tf.Tensor,
    seed: tf.Tensor,
    crop_size: Size,
    padding: int = 0,
    padding_mode: str = "constant",
) -> tf.Tensor:
    """Crops a random window of `crop_size`, after padding every side by `padding` pixels.

    `padding_mode` is that of `tf.pad`: `constant` (zeros), `reflect` or `symmetric`.
    """
    if padding:
        image = tf.pad(image, [[padding, padding], [padding, padding], [0, 0]], padding_mode)
    return tf.image.stateless_random_crop(image, (*_pair(crop_size), image.shape[-1]), seed)


@random_image_op
def inception_crop(
    image: tf.Tensor,
    seed: tf.Tensor,
    size: Size | None = None,
    area_min: float = 5,
    area_max: float = 100,
    *,
    ratio_min: float = 0.75,
    ratio_max: float = 1.33,
    method: str = "bilinear",
    antialias: bool = False,
    sampler: str = "tensorflow",
) -> tf.Tensor:
    """Crops a window of random area (percent of the image) and aspect ratio, resized to `size`.

    The source is "Going Deeper with Convolutions" (Szegedy et al., 2015), section 6. The op is also
    known as random resized crop. `sampler` is "tensorflow", as in big_vision, "torchvision", as in
    DeiT, whose windows are larger, or "flax", as in AlgoPerf; see `crop_window`.
    """
    bounds = (area_min, area_max), (ratio_min, ratio_max)
    window = crop_window(tf.shape(image), seed, *bounds, sampler)
    crop = crop_to(image, window)
    return crop if size is None else resize(crop, size, method, antialias)


def crop_window(
    shape: tf.Tensor,
    seed: tf.Tensor,
    area_percent: tuple[float, float],
    ratios: tuple[float, float],
    sampler: str = "tensorflow",
) -> tf.Tensor:
    """Draws a random window of an image of `shape`: int32 (top, left, height, width).

    sampler: "tensorflow" draws the aspect ratio uniformly, and given it the height; after 100 tries
      it takes the whole image. "torchvision" draws the area uniformly and the logarithm of the
      ratio; after 10 tries it takes the center at the nearest ratio. "flax" is "tensorflow" with
      at least a tenth of the image; after 10 tries it takes the central square of 7/8 of the
      shorter side (Flax's ImageNet example and AlgoPerf).
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler={sampler!r} is not known; {nearest(sampler, SAMPLERS)}")
    if sampler == "torchvision":
        return _area_window(shape, seed, area_percent, ratios)
    is_flax = sampler == "flax"
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]) if is_flax else tf.zeros([0, 0, 4], tf.float32),
        seed,
        min_object_covered=0.1 if is_flax else 0,
        aspect_ratio_range=ratios,
        area_range=[percent / 100 for percent in area_percent],
        max_attempts=10 if is_flax else 100,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    if not is_flax:
        return window
    # Without a window, the op returns the whole image.
    return tf.where(tf.reduce_all(size[:2] == shape[:2]), _central_window(shape), window)


def _central_window(shape: tf.Tensor) -> tf.Tensor:
    """Returns the central square of 7/8 of the shorter side: int32 (top, left, height, width)."""
    side = tf.cast(0.875 * tf.cast(tf.reduce_min(shape[:2]), tf.float32), tf.int32)
    return tf.concat([(shape[:2] - side + 1) // 2, [side, side]], 0)


def _area_window(
    shape: tf.Tensor,
    seed: tf.Tensor,
    area_percent: tuple[float, float],
    ratios: tuple[float, float],
) -> tf.Tensor:
    """Draws a window whose area is uniform, as torchvision's RandomResizedCrop does."""
    tries = 10
    sides = tf.cast(shape[:2], tf.float32)
    draws = tf.random.stateless_uniform([tries, 4], seed)
    low, high = (percent / 100 for percent in area_percent)
    area = (low + draws[:, 0] * (high - low)) * sides[0] * sides[1]
    log_low, log_high = (math.log(ratio) for ratio in ratios)
    ratio = tf.exp(log_low + draws[:, 1] * (log_high - log_low))
    size = tf.round(tf.stack([tf.sqrt(area / ratio), tf.sqrt(area * ratio)], 1))
    fits = tf.reduce_all((size >= 1) & (size <= sides), 1)
    begin = tf.floor(draws[:, 2:] * (sides - size + 1))
    drawn = tf.concat([tf.minimum(begin, sides - size), size], 1)
    center = tf.minimum(sides, tf.round(sides[::-1] / tf.constant([ratios[0], 1 / ratios[1]])))
    center = tf.concat([tf.floor((sides - center) / 2), center], 0)
    first = tf.argmax(tf.cast(fits, tf.int32))
    return tf.cast(tf.where(tf.reduce_any(fits), drawn[first], center), tf.int32)


def crop_to(image: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
    """Crops `image` to a window of `crop_window`."""
    crop = tf.slice(image, tf.concat([window[:2], [0]], 0), tf.concat([window[2:], [-1]], 0))
    return tf.ensure_shape(crop, [None, None, image.shape[-1]])


@random_image_op
def flip_lr(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors the image left to right, with probability one half."""
    return tf.image.stateless_random_flip_left_right(image, seed)


@random_image_op
def random_affine(
    image: tf.Tensor,
    seed: tf.Tensor,
    *,
    rotate: float = 0.0,
    shift: float = 0.0,
    scale: float = 0.0,
    shear: float = 0.0,
    fill: float = 0.0,
) -> tf.Tensor:
    """Applies a small random affine distortion about the center of the image.

    It suits small images, of which a crop would remove too much.

    Args:
        image: uint8 or float `[h, w, c]`.
        seed: int32 `[2]`.
        rotate: the largest angle in degrees, in both directions.
        shift: the largest translation along each axis, as a fraction of the side.
        scale: the largest relative magnification or, equally likely, reduction (0.1: 1/1.1 to 1.1).
        shear: the largest horizontal shear angle in degrees, in both directions.
        fill: the value of pixels from outside the image.
    """
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    draws = tf.random.stateless_uniform([5], seed, -1.0, 1.0)
    bounds = [math.radians(rotate), math.radians(shear), math.log1p(scale), shift, shift]
    angle, slant, log_scale, shift_x, shift_y = tf.unstack(draws * tf.constant(bounds, tf.float32))
    shrink = tf.exp(-log_scale)
    cos, sin, tan = tf.cos(angle) * shrink, tf.sin(angle) * shrink, tf.tan(slant)
    # The input position of an output pixel (x, y), relative to the center: shear, rotate, scale.
    a0, a1 = cos, cos * tan - sin
    b0, b1 = sin, sin * tan + cos
    x, y = (width - 1) / 2, (height - 1) / 2
    out_x, out_y = x + shift_x * width, y + shift_y * height
    transform = [a0, a1, x - a0 * out_x - a1 * out_y, b0, b1, y - b0 * out_x - b1 * out_y, 0.0, 0.0]
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(image, tf.float32)[None],
        transforms=tf.stack(transform)[None],
        output_shape=tf.shape(image)[:2],
        fill_value=fill,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )[0]
    moved = tf.round(moved) if image.dtype.is_integer else moved
    return tf.ensure_shape(tf.cast(moved, image.dtype), image.shape)


def _scaled(
    image: tf.Tensor, size: int, side: Callable[..., tf.Tensor], method: str, antialias: bool
) -> tf.Tensor:
    """Resizes so that `side` (`tf.minimum` or `tf.maximum`) of the two sides becomes `size`."""
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    new_size = scaled_size(tf.stack([height, width]), size / side(height, width))
    return _resized(image, new_size, method, antialias)


def _resized(image: tf.Tensor, size: Size | tf.Tensor, method: str, antialias: bool) -> tf.Tensor:
    """Returns an image of another size and the same dtype; what overshoots is clipped."""
    resized = tf.image.resize(image, size, method=method, antialias=antialias)
    # Clipping takes time, and changes no mean.
    cast = tf.cast if method in MEANS else tf.saturate_cast
    return cast(resized, image.dtype)


def scaled_size(sides: tf.Tensor, ratio: tf.Tensor) -> tf.Tensor:
    """Returns `sides`, float32 (height, width), times `ratio`: int32, each at least one pixel.

    The longer side is bounded by `MAX_SIDE`: a long image of one pixel in height would otherwise
    take all memory when its height is enlarged to 256.
    """
    scaled = tf.round(sides * ratio)
    return tf.cast(tf.clip_by_value(scaled, 1.0, MAX_SIDE), tf.int32)


def _pair(size: Size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
