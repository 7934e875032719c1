"""RandAugment (Cubuk et al., 2020, arXiv:1909.13719), as published ViTs were trained with it."""

from collections.abc import Callable

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import _augmentations as augment
from vit_jax.data.ops import random_image_op

MAX_LEVEL = 10.0

Choice = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]


@random_image_op
def randaug(
    image: tf.Tensor,
    seed: tf.Tensor,
    num_layers: int = 2,
    magnitude: float = 10.0,
    *,
    corrected: bool = False,
) -> tf.Tensor:
    """Applies `num_layers` operations, each drawn from 16, all at strength `magnitude` (of 10).

    The same operation may be drawn twice, and a drawn one is always applied. Three oddities are
    part of what the published accuracies were reached with: Solarize's threshold wraps at 256, so
    that strength 10 inverts the whole image; Contrast moves away from a grey that depends on the
    image's size; and moves and holes are up to 100 and 80 pixels whatever the image's size, which
    leaves little of a small one. `corrected` leaves the image alone in the first case, uses its
    mean grey in the second, and scales with the side in the third (224 pixels being 1).
    """
    augment.require_uint8(image)
    choices = list(_choices(magnitude, corrected).values())
    for layer_seed in tf.unstack(tf.random.split(seed, num_layers)):
        draw_seed, sign_seed, place_seed = tf.unstack(tf.random.split(layer_seed, 3))
        drawn = tf.random.stateless_uniform([], draw_seed, 0, len(choices), tf.int32)
        negate = tf.random.stateless_uniform([], sign_seed) < 0.5
        sign = tf.where(negate, -1.0, 1.0)
        branches = [_bind(choice, image, sign, place_seed) for choice in choices]
        image = tf.switch_case(drawn, branches)
    return image


def _bind(choice: Choice, image: tf.Tensor, sign: tf.Tensor, seed: tf.Tensor) -> Callable:
    return lambda: tf.ensure_shape(choice(image, sign, seed), image.shape)


def _choices(magnitude: float, corrected: bool) -> dict[str, Choice]:
    """The 16 operations at a strength, as functions of (image, sign, seed).

    The sign, drawn at random, is that of the geometric ones.
    """
    level = magnitude / MAX_LEVEL
    enhance = level * 1.8 + 0.1
    threshold = int(level * 256) if corrected else int(level * 256) % 256
    contrast = augment.contrast if corrected else augment.contrast_by_size

    def pixels(image: tf.Tensor, axis: int, length: float) -> tf.Tensor | float:
        side = tf.cast(tf.shape(image)[axis], tf.float32)
        return level * length * side / 224.0 if corrected else level * length

    return {
        "AutoContrast": lambda x, *_: augment.auto_contrast(x),
        "Equalize": lambda x, *_: augment.equalize(x),
        "Invert": lambda x, *_: augment.invert(x),
        "Rotate": lambda x, sign, _: augment.rotate(x, sign * level * 30.0),
        "Posterize": lambda x, *_: augment.posterize(x, int(level * 4)),
        "Solarize": lambda x, *_: augment.solarize(x, threshold),
        "Color": lambda x, *_: augment.color(x, enhance),
        "Contrast": lambda x, *_: contrast(x, enhance),
        "Brightness": lambda x, *_: augment.brightness(x, enhance),
        "Sharpness": lambda x, *_: augment.sharpness(x, enhance),
        "ShearX": lambda x, sign, _: augment.shear_x(x, sign * level * 0.3),
        "ShearY": lambda x, sign, _: augment.shear_y(x, sign * level * 0.3),
        "TranslateX": lambda x, sign, _: augment.translate_x(x, sign * pixels(x, 1, 100.0)),
        "TranslateY": lambda x, sign, _: augment.translate_y(x, sign * pixels(x, 0, 100.0)),
        "Cutout": lambda x, _, seed: augment.cutout(x, tf.cast(pixels(x, 0, 40.0), tf.int32), seed),
        "SolarizeAdd": lambda x, *_: augment.solarize_add(x, int(level * 110)),
    }
