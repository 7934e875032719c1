"""The image operations that AutoAugment, RandAugment and 3-Augment choose from.

uint8 `[h, w, c]` in and out. Where a computation is in floats, its result is truncated, not
rounded: published models were trained so. Geometry reads the nearest pixel, and fills what comes in
from outside with grey.
"""

import math
from collections.abc import Callable

import numpy as np

from vit_jax.data.host_tensorflow import tf

FILL = 128


def require_uint8(image: tf.Tensor) -> None:
    if image.dtype != tf.uint8:
        raise ValueError(f"needs uint8 images, not {image.dtype.name}: put it before value_range")


def blend(start: tf.Tensor, image: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """From `start` (factor 0) to `image` (1) and beyond, clipped to 0..255."""
    start, image = tf.cast(start, tf.float32), tf.cast(image, tf.float32)
    return _to_uint8(start + factor * (image - start))


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel to 0..255; a channel of one value stays as it is."""
    pixels = tf.cast(image, tf.float32)
    low, high = (_over_pixels(reduce, pixels) for reduce in (tf.reduce_min, tf.reduce_max))
    scale = tf.where(high > low, 255.0 / (high - low), 1.0)
    offset = tf.where(high > low, low * scale, 0.0)
    return _to_uint8(pixels * scale - offset)


def _over_pixels(reduce: Callable, pixels: tf.Tensor) -> tf.Tensor:
    """`reduce` of each channel: `[c]`. Whole rows at a time, which is many times faster."""
    rows = reduce(_as_rows(pixels), axis=0)
    return reduce(tf.reshape(rows, [-1, pixels.shape[-1]]), axis=0)


def _as_rows(image: tf.Tensor) -> tf.Tensor:
    """`[h, w, c]` as `[h, w * c]`."""
    return tf.reshape(image, [tf.shape(image)[0], -1])


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Spreads the values of each channel so that all occur about equally often."""
    channels = image.shape[-1]
    numbered = tf.cast(image, tf.int32) + 256 * tf.range(channels)
    counts = tf.raw_ops.DenseBincount(
        input=tf.reshape(numbered, [-1]),
        size=256 * channels,
        weights=tf.zeros([0], tf.int32),
        binary_output=False,
    )
    counts = tf.reshape(counts, [channels, 256])
    total = tf.reduce_sum(counts, axis=1)
    highest = 255 - tf.argmax(tf.cast(counts[:, ::-1] > 0, tf.int32), axis=1, output_type=tf.int32)
    step = (total - tf.gather(counts, highest, batch_dims=1)) // 255
    at_least_one = tf.maximum(step, 1)[:, None]
    below = tf.cumsum(counts, axis=1, exclusive=True)
    table = tf.minimum((below + at_least_one // 2) // at_least_one, 255)
    table = tf.concat([tf.zeros([channels, 1], tf.int32), table[:, 1:]], axis=1)
    table = tf.where((step == 0)[:, None], tf.range(256), table)
    return tf.cast(tf.gather(tf.reshape(table, [-1]), numbered), tf.uint8)


def invert(image: tf.Tensor) -> tf.Tensor:
    return 255 - image


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
    """Keeps the highest `bits` bits of every value (at least one)."""
    cleared = tf.constant(min(8 - bits, 7), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, cleared), cleared)


def solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
    """Inverts the values from `threshold` on."""
    if threshold == 0:
        return invert(image)
    if threshold > 255:
        return image
    return tf.bitwise.bitwise_xor(image, _all_bits(image >= threshold))


def solarize_add(image: tf.Tensor, addition: int) -> tf.Tensor:
    """Lightens the values below 128."""
    dark = _all_bits(image < 128)
    if addition < 128:
        return image + tf.bitwise.bitwise_and(dark, tf.constant(addition, tf.uint8))
    # More than a byte holds becomes 255.
    sum_ = image + tf.constant(addition % 256, tf.uint8)
    lightened = tf.bitwise.bitwise_or(sum_, _all_bits(image > 255 - addition))
    change = tf.bitwise.bitwise_and(dark, tf.bitwise.bitwise_xor(image, lightened))
    return tf.bitwise.bitwise_xor(image, change)


def grayscale(image: tf.Tensor) -> tf.Tensor:
    """Luma in every channel; a grey image stays as it is."""
    if image.shape[-1] != 3:
        return image
    return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image))


def color(image: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """Saturation: 0 is grey, 1 the image."""
    return blend(grayscale(image), image, factor)


def brightness(image: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """0 is black, 1 the image."""
    return blend(tf.constant(0.0), image, factor)


def contrast(image: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """0 is the image's mean grey, 1 the image."""
    mean = tf.reduce_mean(tf.cast(grayscale(image), tf.float32))
    return blend(mean, image, factor)


def contrast_by_size(image: tf.Tensor, factor: float) -> tf.Tensor:
    """As `contrast`, but away from a grey that depends on the size of the image alone.

    What published RandAugment runs did: the "mean" is the number of pixels over 256, at most 255.
    """
    height, width = tf.unstack(tf.shape(image)[:2])
    grey = tf.minimum(height * width // 256, 255)
    return blend(tf.cast(grey, tf.float32), image, factor)


def sharpness(image: tf.Tensor, factor: float | tf.Tensor) -> tf.Tensor:
    """0 is smoothed by a 3x3 filter, 1 the image; pixels at the border stay."""
    channels = image.shape[-1]
    pixels = tf.cast(_as_rows(image), tf.float32)
    change = _smooth(pixels, channels) - pixels[1:-1, channels:-channels]
    smoothed = pixels + tf.pad(change, [[1, 1], [channels, channels]])
    return tf.reshape(blend(smoothed, pixels, factor), tf.shape(image))


def _smooth(pixels: tf.Tensor, channels: int) -> tf.Tensor:
    """The filter [1 1 1; 1 5 1; 1 1 1] / 13, truncated, where it fits: `[h - 2, (w - 2) c]`.

    Where the sum is a whole multiple of 13, rounding decides on which side of it truncation sees
    it. There it is formed as the published runs did, row by row with fused multiply-adds (products
    exact, each sum rounded to float32), on every processor alike. pixels: float32 `[h, w c]`.
    """
    right = 2 * channels
    columns = pixels[:-2] + pixels[1:-1] + pixels[2:]
    total = columns[:, :-right] + columns[:, channels:-channels] + columns[:, right:]
    total += 4.0 * pixels[1:-1, channels:-channels]
    smooth = tf.reshape(tf.floor((total + 0.5) * (1 / 13)), [-1])
    multiples = tf.where(smooth * 13.0 == tf.reshape(total, [-1]))
    exact = tf.floor(_fused_sum(pixels, channels, tf.cast(multiples[:, 0], tf.int32)))
    return tf.reshape(tf.tensor_scatter_nd_update(smooth, multiples, exact), tf.shape(total))


def _fused_sum(pixels: tf.Tensor, channels: int, places: tf.Tensor) -> tf.Tensor:
    """The filter of `_smooth` at some places, numbered through its output: float32 `[n]`."""
    width = tf.shape(pixels)[1]
    corners = places + 2 * channels * (places // (width - 2 * channels))
    values = tf.reshape(pixels, [-1])
    total = tf.zeros([], tf.float64)
    for row in range(3):
        for column in range(3):
            weight = np.float64(np.float32((5 if row == column == 1 else 1) / 13))
            window = tf.gather(values, corners + (row * width + column * channels))
            product = tf.cast(window, tf.float64) * weight
            total = tf.cast(tf.cast(total + product, tf.float32), tf.float64)
    return tf.cast(total, tf.float32)


def rotate(image: tf.Tensor, degrees: float | tf.Tensor) -> tf.Tensor:
    """Turns counter-clockwise about the centre."""
    angle = degrees * (math.pi / 180.0)
    cos, sin = tf.cos(angle), tf.sin(angle)
    bottom, right = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32) - 1.0)
    x = (right - (cos * right - sin * bottom)) / 2.0
    y = (bottom - (sin * right + cos * bottom)) / 2.0
    return _warp(image, [cos, -sin, x, sin, cos, y])


def shear_x(image: tf.Tensor, slope: float | tf.Tensor) -> tf.Tensor:
    return _warp(image, [1.0, slope, 0.0, 0.0, 1.0, 0.0])


def shear_y(image: tf.Tensor, slope: float | tf.Tensor) -> tf.Tensor:
    return _warp(image, [1.0, 0.0, 0.0, slope, 1.0, 0.0])


def translate_x(image: tf.Tensor, pixels: float | tf.Tensor) -> tf.Tensor:
    """Moves left by `pixels`."""
    return _shifted(image, pixels, axis=1)


def translate_y(image: tf.Tensor, pixels: float | tf.Tensor) -> tf.Tensor:
    """Moves up by `pixels`."""
    return _shifted(image, pixels, axis=0)


def _shifted(image: tf.Tensor, pixels: float | tf.Tensor, axis: int) -> tf.Tensor:
    side = tf.shape(image)[axis]
    shift = tf.clip_by_value(tf.cast(tf.round(pixels), tf.int32), -side, side)
    before, after = tf.maximum(-shift, 0), tf.maximum(shift, 0)
    fill = tf.constant(FILL, tf.uint8)
    if axis == 0:
        seen, margins = image[after : side - before], [[before, after], [0, 0], [0, 0]]
    else:
        seen, margins = image[:, after : side - before], [[0, 0], [before, after], [0, 0]]
    return tf.ensure_shape(tf.pad(seen, margins, constant_values=fill), image.shape)


def cutout(image: tf.Tensor, half_side: int | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Greys a square of side `2 * half_side` whose centre may be anywhere in the image."""
    height, width, channels = tf.unstack(tf.shape(image))
    row_seed, column_seed = tf.unstack(tf.random.split(seed))
    rows = _near_a_place(height, half_side, row_seed)
    columns = tf.repeat(_near_a_place(width, half_side, column_seed), channels)
    hidden = tf.reshape(_all_bits(rows[:, None] & columns[None, :]), tf.shape(image))
    change = tf.bitwise.bitwise_xor(image, tf.constant(FILL, tf.uint8))
    return tf.bitwise.bitwise_xor(image, tf.bitwise.bitwise_and(hidden, change))


def _near_a_place(side: tf.Tensor, distance: int | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Which of `side` places are in `[-distance, distance)` of a random one: bool `[side]`."""
    offset = tf.range(side) - tf.random.stateless_uniform([], seed, 0, side, tf.int32)
    return (offset >= -distance) & (offset < distance)


def _warp(image: tf.Tensor, transform: list[float | tf.Tensor]) -> tf.Tensor:
    """Output pixel (x, y) reads input (t0 x + t1 y + t2, t3 x + t4 y + t5).

    What is warped is the number of each pixel, a third of the work; number 0 is the grey around.
    """
    height, width, channels = tf.unstack(tf.shape(image))
    numbers = tf.reshape(tf.range(1, height * width + 1), [1, height, width, 1])
    places = tf.raw_ops.ImageProjectiveTransformV3(
        images=numbers,
        transforms=tf.stack([*transform, 0.0, 0.0])[None],
        output_shape=tf.shape(image)[:2],
        fill_value=0.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )
    around = tf.fill([1, channels], tf.constant(FILL, tf.uint8))
    pixels = tf.concat([around, tf.reshape(image, [-1, image.shape[-1]])], axis=0)
    return tf.ensure_shape(tf.gather(pixels, places[0, :, :, 0]), image.shape)


def _all_bits(chosen: tf.Tensor) -> tf.Tensor:
    """uint8 255 where `chosen`, else 0: with bitwise operations much faster than `tf.where`."""
    return 255 * tf.cast(chosen, tf.uint8)


def _to_uint8(values: tf.Tensor) -> tf.Tensor:
    """Clips, then truncates."""
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)
