"""Random changes of color and sharpness, on uint8 images."""

from collections.abc import Callable

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import Batched, image_op, random_image_op, require_uint8

_BLUR_SIGMA = (0.1, 2.0)
_BLUR_RADIUS = 6


@random_image_op
def color_jitter(
    image: tf.Tensor,
    seed: tf.Tensor,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    *,
    hue: float = 0.0,
    probability: float = 1.0,
) -> Batched:
    """Changes an image's properties in random order, with a probability.

    The first three are scaled by a random factor from [1 - x, 1 + x]. The hue is turned by up to
    `hue`, a share of the circle, in either direction. DINO, DINOv2 and I-JEPA have 0.4, 0.4, 0.2
    and 0.1 with probability 0.8.
    """
    require_uint8(image)
    order_seed, factor_seed = tf.unstack(tf.random.split(seed))
    strengths = [brightness, contrast, saturation, *([hue] if hue else [])]
    draws = tf.random.stateless_uniform([len(strengths)], factor_seed, -1.0, 1.0)
    changes = tf.constant(strengths, tf.float32) * draws
    factors = tf.concat([tf.maximum(1.0 + changes[:3], 0.0), changes[3:]], 0)
    order = tf.argsort(tf.random.stateless_uniform([len(strengths)], order_seed))
    from vit_jax.data.ops._kernels import jitter

    return Batched(jitter, (image, _if_chosen(seed, probability, order), factors))


@random_image_op
def grayscale(image: tf.Tensor, seed: tf.Tensor, probability: float = 1.0) -> Batched:
    """Replaces the colors by their luma in all channels, with a probability."""
    from vit_jax.data.ops._filters import GRAYSCALE

    return _filtered(image, _if_chosen(seed, probability, tf.constant(GRAYSCALE)))


@random_image_op
def solarize(image: tf.Tensor, seed: tf.Tensor, probability: float = 1.0) -> Batched:
    """Inverts the values from 128 on, with a probability."""
    from vit_jax.data.ops._filters import SOLARIZATION

    return _filtered(image, _if_chosen(seed, probability, tf.constant(SOLARIZATION)))


@random_image_op
def gaussian_blur(
    image: tf.Tensor,
    seed: tf.Tensor,
    probability: float = 1.0,
    sigma_min: float = _BLUR_SIGMA[0],
    sigma_max: float = _BLUR_SIGMA[1],
    *,
    radius: int = _BLUR_RADIUS,
) -> Batched:
    """Blurs by a Gaussian of a random deviation in pixels, with a probability.

    radius: the distance in pixels at which the Gaussian is cut off; 4 in DINOv2. DINO uses the
      approximation of PIL's `GaussianBlur`, for which 6 is near.
    """
    if not 0 < sigma_min <= sigma_max or radius < 1:
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}, radius={radius}: write a range above 0"
            " and a radius of at least 1"
        )
    sigma = tf.random.stateless_uniform([], seed, sigma_min, sigma_max)
    from vit_jax.data.ops._filters import BLUR

    return _filtered(image, _if_chosen(seed, probability, tf.constant(BLUR)), sigma, radius)


def _if_chosen(seed: tf.Tensor, probability: float, numbers: tf.Tensor) -> tf.Tensor:
    """Returns `numbers` of operations with a probability, else -1 for each."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability}: write a number from 0 to 1")
    key = tf.random.experimental.stateless_fold_in(seed, 1)
    chosen = tf.random.stateless_uniform([], key) < probability
    return tf.where(chosen, numbers, -tf.ones_like(numbers))


def _filtered(
    image: tf.Tensor, drawn: tf.Tensor, sigma: tf.Tensor | None = None, radius: int = _BLUR_RADIUS
) -> Batched:
    require_uint8(image)
    from vit_jax.data.ops._filters import filtered

    sigma = tf.constant(1.0) if sigma is None else sigma
    return Batched(filtered, (image, drawn, sigma, tf.constant(radius)))


@random_image_op
def three_augment(image: tf.Tensor, seed: tf.Tensor) -> Batched:
    """Applies grayscale, solarization, or Gaussian blur, with equal probabilities.

    This is the "3-Augment" of DeiT III (Touvron et al., 2022, arXiv:2204.07118), which applies
    `color_jitter` at 0.3 afterwards.
    """
    draw_seed, blur_seed = tf.unstack(tf.random.split(seed))
    drawn = tf.random.stateless_uniform([], draw_seed, 0, 3, tf.int32)
    return _filtered(image, drawn, tf.random.stateless_uniform([], blur_seed, *_BLUR_SIGMA))


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
