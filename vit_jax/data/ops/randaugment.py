"""RandAugment (Cubuk et al., 2020, arXiv:1909.13719), as published ViTs were trained with it."""

import functools
from typing import NamedTuple

import numpy as np

from vit_jax.augment import strengths
from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import Batched, random_image_op, require_uint8

MEAN_OF_IMAGENET = (124, 116, 104)


@random_image_op
def randaug(
    image: tf.Tensor,
    seed: tf.Tensor,
    num_layers: int = 2,
    magnitude: float = 10.0,
    *,
    corrected: bool = False,
) -> Batched:
    """Applies `num_layers` operations, each drawn from 16, all at strength `magnitude` (of 10).

    The same operation may be drawn twice, and a drawn operation is always applied. The published
    accuracies were reached with three oddities, which are the default here: the threshold of
    Solarize wraps at 256, so strength 10 inverts the whole image; Contrast moves values away from a
    gray that depends on the size of the image; and translations and holes are up to 100 and 80
    pixels for images of any size, which leaves little of a small image. `corrected` removes them:
    Solarize at strength 10 leaves the image unchanged, Contrast uses the mean gray of the image,
    and lengths scale with the side of the image (with factor 1 at 224 pixels).
    """
    require_uint8(image)
    draws = [_draw(layer_seed, image) for layer_seed in _split(seed, num_layers)]
    draws = tf.stack(draws) if draws else tf.zeros([0, 4], tf.int32)

    def apply(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        from vit_jax.data.ops._kernels import augment

        return augment(images, draws, at_strength(magnitude / 10.0, images.shape[1:3], corrected))

    return Batched(apply, (image, draws))


@random_image_op
def randaug_increasing(
    image: tf.Tensor,
    seed: tf.Tensor,
    num_layers: int = 2,
    magnitude: float = 9.0,
    deviation: float = 0.5,
    *,
    probability: float = 0.5,
) -> Batched:
    """Applies timm's RandAugment, of which every operation is stronger at a larger magnitude.

    This is `rand-m9-mstd0.5-inc1` of timm (timm/data/auto_augment.py), with which DeiT, DeiT III,
    MAE and ViT-5 train or fine-tune. Each of the layers draws one of 15 operations and applies it
    with a probability, at a magnitude from a normal distribution, which is cut off at 0 and 10.
    Translations are up to 45 % of the side, warps are bicubic, and pixels from outside the image
    have the mean of ImageNet. Values are those of Pillow.
    """
    require_uint8(image)
    from vit_jax.data.ops._increasing import OPERATIONS, augment

    draw_seed, chosen_seed, noise_seed, sign_seed = _split(seed, 4)
    drawn = tf.random.stateless_uniform([num_layers], draw_seed, 0, len(OPERATIONS), tf.int32)
    chosen = tf.random.stateless_uniform([num_layers], chosen_seed) < probability
    noise = deviation * tf.random.stateless_normal([num_layers], noise_seed)
    sign = tf.where(tf.random.stateless_uniform([num_layers], sign_seed) < 0.5, -0.1, 0.1)
    shares = sign * tf.clip_by_value(magnitude + noise, 0.0, 10.0)
    fill = MEAN_OF_IMAGENET if image.shape[-1] == 3 else MEAN_OF_IMAGENET[1:2]
    drawn = tf.where(chosen, drawn, -1)
    return Batched(augment, (image, drawn, shares, tf.constant(fill, tf.uint8)))


def _draw(seed: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """Returns the random numbers of a layer: (operation, negative, row, column), int32.

    `negative` is 1 where the strength of a geometric operation is negative.
    """
    draw_seed, sign_seed, place_seed = _split(seed, 3)
    drawn = tf.random.stateless_uniform([], draw_seed, 0, len(strengths.OPERATIONS), tf.int32)
    negative = tf.cast(tf.random.stateless_uniform([], sign_seed) < 0.5, tf.int32)
    place = [
        tf.random.stateless_uniform([], side_seed, 0, side, tf.int32)
        for side_seed, side in zip(
            _split(place_seed, 2), tf.unstack(tf.shape(image)[:2]), strict=True
        )
    ]
    return tf.stack([drawn, negative, *place])


def _split(seed: tf.Tensor, count: int) -> list[tf.Tensor]:
    return tf.unstack(tf.random.split(seed, count))


class Operations(NamedTuple):
    """The tables, matrices, and factors of the operations for images of one size."""

    tables: np.ndarray
    """uint8 `[operations, 256]`."""
    matrices: np.ndarray
    """float32 `[operations, 2, 2, 3]`."""
    enhancement: np.float32
    half_side: int
    contrast_by_size: bool


@functools.cache
def at_strength(level: float, size: tuple[int, int], corrected: bool) -> Operations:
    return Operations(
        strengths.fixed_tables(level, size, corrected),
        strengths.matrices(level, size, corrected),
        strengths.enhancement(level),
        strengths.half_side(level, size[0], corrected),
        not corrected,
    )
