"""Random changes of color and sharpness, on uint8 images."""

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


@image_op
def rgb(image: tf.Tensor) -> tf.Tensor:
    """Repeats the channel of a gray image `[h, w, 1]` three times; keeps other images."""
    return tf.image.grayscale_to_rgb(image) if image.shape[-1] == 1 else image
