"""Random changes of color and sharpness, on uint8 images."""

from collections.abc import Callable

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import Batched, image_op, random_image_op, require_uint8

_BLUR_SIGMA = (0.1, 2.0)


@random_image_op
def color_jitter(
    image: tf.Tensor,
    seed: tf.Tensor,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
) -> Batched:
    """Scales each property by a random factor from [1 - x, 1 + x], in random order."""
    require_uint8(image)
    order_seed, factor_seed = tf.unstack(tf.random.split(seed))
    strengths = tf.constant([brightness, contrast, saturation], tf.float32)
    draws = tf.random.stateless_uniform([3], factor_seed, -1.0, 1.0)
    factors = tf.maximum(1.0 + strengths * draws, 0.0)
    order = tf.argsort(tf.random.stateless_uniform([3], order_seed))
    from vit_jax.data.ops._kernels import jitter

    return Batched(jitter, (image, order, factors))


@random_image_op
def three_augment(image: tf.Tensor, seed: tf.Tensor) -> Batched:
    """Applies grayscale, solarization, or Gaussian blur, with equal probabilities.

    This is the "3-Augment" of DeiT III (Touvron et al., 2022, arXiv:2204.07118), which applies
    `color_jitter` at 0.3 afterwards.
    """
    require_uint8(image)
    draw_seed, blur_seed = tf.unstack(tf.random.split(seed))
    drawn = tf.random.stateless_uniform([], draw_seed, 0, 3, tf.int32)
    sigma = tf.random.stateless_uniform([], blur_seed, *_BLUR_SIGMA)
    from vit_jax.data.ops._kernels import one_of_three

    return Batched(one_of_three, (image, drawn, sigma))


@random_image_op
def photometric_distortion(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Changes brightness, contrast, saturation and hue, each with probability one half.

    This is what SSD (Liu et al., 2016, section 2.2) and mmsegmentation train with: brightness is
    moved by up to 32 of 255, contrast and saturation are scaled by 0.5 to 1.5, hue is turned by up
    to 36 degrees. Contrast comes before or after the two others, by a fair coin. The image stays
    uint8 after each of them.
    """
    require_uint8(image)
    strength_seed, coin_seed = tf.unstack(tf.random.split(seed))
    draws = tf.unstack(tf.random.stateless_uniform([4], strength_seed, -1.0, 1.0))
    coins = tf.unstack(tf.random.stateless_uniform([5], coin_seed) < 0.5)

    def scaled(x: tf.Tensor, factor: tf.Tensor | float, offset: tf.Tensor | float) -> tf.Tensor:
        return tf.floor(tf.clip_by_value(x * factor + offset, 0.0, 255.0))

    def if_drawn(coin: tf.Tensor, change: Callable, x: tf.Tensor) -> tf.Tensor:
        return tf.cond(coin, lambda: change(x), lambda: x)

    def contrasted(x: tf.Tensor) -> tf.Tensor:
        return scaled(x, 1.0 + 0.5 * draws[1], 0.0)

    def recolored(x: tf.Tensor) -> tf.Tensor:
        hue, saturation, value = tf.unstack(tf.image.rgb_to_hsv(x / 255.0), axis=-1)
        factor = tf.where(coins[2], 1.0 + 0.5 * draws[2], 1.0)
        saturation = tf.clip_by_value(saturation * factor, 0.0, 1.0)
        hue = tf.math.floormod(hue + tf.where(coins[3], 0.1 * draws[3], 0.0), 1.0)
        return tf.round(255.0 * tf.image.hsv_to_rgb(tf.stack([hue, saturation, value], axis=-1)))

    x = tf.cast(image, tf.float32)
    x = if_drawn(coins[0], lambda x: scaled(x, 1.0, 32.0 * draws[0]), x)
    x = if_drawn(coins[1] & coins[4], contrasted, x)
    x = if_drawn(coins[2] | coins[3], recolored, x)
    x = if_drawn(coins[1] & ~coins[4], contrasted, x)
    return tf.ensure_shape(tf.saturate_cast(x, tf.uint8), image.shape)


@image_op
def rgb(image: tf.Tensor) -> tf.Tensor:
    """Repeats the channel of a gray image `[h, w, 1]` three times; keeps other images."""
    return tf.image.grayscale_to_rgb(image) if image.shape[-1] == 1 else image
