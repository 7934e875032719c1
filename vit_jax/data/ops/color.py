"""Random changes of colour and sharpness, on uint8 images."""

import numpy as np

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import Batched, image_op, random_image_op, require_uint8
from vit_jax.data.ops import _pixels as pixels

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
    return Batched(_jitter, (image, order, factors))


BRIGHTNESS, CONTRAST = range(2)


@pixels.kernel
def _jitter(images, orders, factors):
    """orders: int32 `[b, 3]`, which property comes first. factors: float32 `[b, 3]`."""
    out = np.empty_like(images)
    for number in range(len(images)):
        image = images[number].copy()
        for drawn in orders[number]:
            factor = factors[number, drawn]
            if drawn == BRIGHTNESS:
                image = pixels.brightness(image, factor)
            elif drawn == CONTRAST:
                image = pixels.contrast(image, factor)
            else:
                image = pixels.color(image, factor)
        pixels.assign(out, number, image)
    return out


@random_image_op
def three_augment(image: tf.Tensor, seed: tf.Tensor) -> Batched:
    """Greyscale, solarisation or Gaussian blur, one of them, each as likely.

    The "3-Augment" of DeiT III (Touvron et al., 2022, arXiv:2204.07118), which has `color_jitter`
    at 0.3 follow.
    """
    require_uint8(image)
    draw_seed, blur_seed = tf.unstack(tf.random.split(seed))
    drawn = tf.random.stateless_uniform([], draw_seed, 0, 3, tf.int32)
    sigma = tf.random.stateless_uniform([], blur_seed, *_BLUR_SIGMA)
    return Batched(_one_of_three, (image, drawn, sigma))


GREYSCALE, SOLARISATION = range(2)


@pixels.kernel
def _one_of_three(images, drawn, sigmas):
    """drawn: int32 `[b]`, which of the three. sigmas: float32 `[b]`, of the blur."""
    out = np.empty_like(images)
    for number in range(len(images)):
        image = images[number].copy()
        if drawn[number] == GREYSCALE:
            image = pixels.grayscale(image)
        elif drawn[number] == SOLARISATION:
            image = pixels.solarize(image, 128)
        else:
            image = pixels.gaussian_blur(image, sigmas[number])
        pixels.assign(out, number, image)
    return out


@image_op
def rgb(image: tf.Tensor) -> tf.Tensor:
    """A grey image `[h, w, 1]` as one of three equal channels; one of three channels passes."""
    return tf.image.grayscale_to_rgb(image) if image.shape[-1] == 1 else image
