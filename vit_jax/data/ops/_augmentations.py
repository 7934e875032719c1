"""The image operations that AutoAugment, RandAugment and 3-Augment choose from.

uint8 `[h, w, c]` in and out. Where a computation is in floats, its result is truncated, not
rounded: published models were trained so. Geometry reads the nearest pixel, and fills what comes in
from outside with grey.
"""

import math

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
    columns = tf.transpose(tf.reshape(image, [-1, image.shape[-1]]))  # Faster to reduce.
    low = tf.cast(tf.reduce_min(columns, axis=1), tf.float32)
    high = tf.cast(tf.reduce_max(columns, axis=1), tf.float32)
    scale = tf.where(high > low, 255.0 / (high - low), 1.0)
    offset = tf.where(high > low, low * scale, 0.0)
    return _to_uint8(tf.cast(image, tf.float32) * scale - offset)


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
    return _mapped(image, [x if x < threshold else 255 - x for x in range(256)])


def solarize_add(image: tf.Tensor, addition: int) -> tf.Tensor:
    """Lightens the values below 128."""
    return _mapped(image, [min(x + addition, 255) if x < 128 else x for x in range(256)])


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
    return blend(tf.zeros_like(image), image, factor)


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
    pixels = tf.cast(image, tf.float32)
    change = tf.floor(_smooth(image)) - pixels[1:-1, 1:-1]
    return blend(pixels + tf.pad(change, [[1, 1], [1, 1], [0, 0]]), pixels, factor)


def _smooth(image: tf.Tensor) -> tf.Tensor:
    """The filter [1 1 1; 1 5 1; 1 1 1] / 13 where it fits: float32 `[h - 2, w - 2, c]`.

    Many sums are whole multiples of 13, and rounding decides which side of the integer they fall
    on before truncation. So the sum is formed as the published runs did, row by row with fused
    multiply-adds (products exact, each sum rounded to float32), on every processor alike.
    """
    pixels = tf.cast(image, tf.float64)
    height, width = tf.unstack(tf.shape(image)[:2])
    total = tf.zeros([], tf.float64)
    for row in range(3):
        for column in range(3):
            weight = np.float64(np.float32((5 if row == column == 1 else 1) / 13))
            window = pixels[row : height - 2 + row, column : width - 2 + column]
            total = tf.cast(tf.cast(total + window * weight, tf.float32), tf.float64)
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
    return _warp(image, [1.0, 0.0, pixels, 0.0, 1.0, 0.0])


def translate_y(image: tf.Tensor, pixels: float | tf.Tensor) -> tf.Tensor:
    """Moves up by `pixels`."""
    return _warp(image, [1.0, 0.0, 0.0, 0.0, 1.0, pixels])


def cutout(image: tf.Tensor, half_side: int | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Greys a square of side `2 * half_side` whose centre may be anywhere in the image."""
    shape = tf.shape(image)[:2]
    inside = []
    for axis, axis_seed in enumerate(tf.unstack(tf.random.split(seed))):
        centre = tf.random.stateless_uniform([], axis_seed, 0, shape[axis], tf.int32)
        offset = tf.range(shape[axis]) - centre
        inside.append((offset >= -half_side) & (offset < half_side))
    hidden = (inside[0][:, None] & inside[1][None, :])[:, :, None]
    return tf.where(hidden, tf.constant(FILL, tf.uint8), image)


def _warp(image: tf.Tensor, transform: list[float | tf.Tensor]) -> tf.Tensor:
    """Output pixel (x, y) reads input (t0 x + t1 y + t2, t3 x + t4 y + t5).

    The channels of a pixel travel as one 32-bit number, a quarter of the work. A channel of ones
    among them tells what was read from outside.
    """
    channels = image.shape[-1]
    ones = tf.ones_like(image[..., :1])
    packed = tf.bitcast(tf.concat([image, *[ones] * (4 - channels)], axis=-1), tf.int32)
    warped = tf.raw_ops.ImageProjectiveTransformV3(
        images=packed[None, :, :, None],
        transforms=tf.stack([*transform, 0.0, 0.0])[None],
        output_shape=tf.shape(image)[:2],
        fill_value=0.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]
    outside = tf.bitcast(tf.fill([4], tf.constant(FILL, tf.uint8)), tf.int32)
    filled = tf.bitcast(tf.where(warped == 0, outside, warped)[..., 0], tf.uint8)
    return tf.ensure_shape(filled[..., :channels], image.shape)


def _mapped(image: tf.Tensor, table: list[int]) -> tf.Tensor:
    """Every value through a table of 256; faster than `tf.where`, which is slow on bytes."""
    return tf.gather(tf.constant(table, tf.uint8), tf.cast(image, tf.int32))


def _to_uint8(values: tf.Tensor) -> tf.Tensor:
    """Clips, then truncates."""
    return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)
