"""Random changes of colour and sharpness, on uint8 images."""

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import _augmentations as augment
from vit_jax.data.ops import image_op, random_image_op

_BLUR_RADIUS = 6
_BLUR_SIGMA = (0.1, 2.0)


@random_image_op
def color_jitter(
    image: tf.Tensor,
    seed: tf.Tensor,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
) -> tf.Tensor:
    """Scales each property by a random factor from [1 - x, 1 + x], in random order."""
    augment.require_uint8(image)
    order_seed, factor_seed = tf.unstack(tf.random.split(seed))
    strengths = tf.constant([brightness, contrast, saturation], tf.float32)
    draws = tf.random.stateless_uniform([3], factor_seed, -1.0, 1.0)
    factors = tf.maximum(1.0 + strengths * draws, 0.0)
    order = tf.argsort(tf.random.stateless_uniform([3], order_seed))
    for place in tf.unstack(order):
        image = _switch(
            place, [augment.brightness, augment.contrast, augment.color], image, factors
        )
    return image


@random_image_op
def three_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Greyscale, solarisation or Gaussian blur, one of them, each as likely.

    The "3-Augment" of DeiT III (Touvron et al., 2022, arXiv:2204.07118), which has `color_jitter`
    at 0.3 follow.
    """
    augment.require_uint8(image)
    draw_seed, blur_seed = tf.unstack(tf.random.split(seed))
    drawn = tf.random.stateless_uniform([], draw_seed, 0, 3, tf.int32)
    sigma = tf.random.stateless_uniform([], blur_seed, *_BLUR_SIGMA)
    branches = [
        lambda: augment.grayscale(image),
        lambda: augment.solarize(image, 128),
        lambda: gaussian_blur(image, sigma),
    ]
    return tf.ensure_shape(tf.switch_case(drawn, branches), image.shape)


@image_op
def rgb(image: tf.Tensor) -> tf.Tensor:
    """A grey image `[h, w, 1]` as one of three equal channels; one of three channels passes."""
    return tf.image.grayscale_to_rgb(image) if image.shape[-1] == 1 else image


def gaussian_blur(image: tf.Tensor, sigma: tf.Tensor) -> tf.Tensor:
    """Convolves with a Gaussian of `sigma` (at most 2) pixels; the border is mirrored."""
    offsets = tf.range(-_BLUR_RADIUS, _BLUR_RADIUS + 1, dtype=tf.float32)
    weights = tf.nn.softmax(-(offsets**2) / (2 * sigma**2))
    margin = [_BLUR_RADIUS, _BLUR_RADIUS]
    pixels = tf.pad(tf.cast(image, tf.float32), [margin, margin, [0, 0]], "SYMMETRIC")[None]
    for shape in ([-1, 1, 1, 1], [1, -1, 1, 1]):
        kernel = tf.tile(tf.reshape(weights, shape), [1, 1, image.shape[-1], 1])
        pixels = tf.nn.depthwise_conv2d(pixels, kernel, strides=[1, 1, 1, 1], padding="VALID")
    return tf.cast(tf.clip_by_value(tf.round(pixels[0]), 0, 255), tf.uint8)


def _switch(number: tf.Tensor, operations: list, image: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Applies the operation of that number with the factor of that number."""
    branches = [
        lambda operation=operation, factor=factor: operation(image, factor)
        for operation, factor in zip(operations, tf.unstack(factors), strict=True)
    ]
    return tf.ensure_shape(tf.switch_case(number, branches), image.shape)
