"""Ops that map pixel values to the range or statistics that a model expects, in float32.

Without these ops, the pipeline sends uint8 to the device, a quarter of the bytes, and the device
normalizes. The ops are for pipelines that must equal a published pipeline to the last bit.
"""

import numpy as np

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import image_op

Number = int | float | tuple[float, ...]


@image_op
def value_range(
    image: tf.Tensor,
    vmin: float = -1,
    vmax: float = 1,
    in_min: Number = 0,
    in_max: Number = 255,
    *,
    clip_values: bool = False,
) -> tf.Tensor:
    """Maps `in_min`..`in_max` (numbers, or one for each channel) linearly to `vmin`..`vmax`."""
    low, high = (tf.constant(bound, tf.float32) for bound in (in_min, in_max))
    if np.any(np.equal(in_min, in_max)):
        raise ValueError(f"in_min={in_min} and in_max={in_max} are equal")
    image = (tf.cast(image, tf.float32) - low) / (high - low)
    image = vmin + image * (vmax - vmin)
    return tf.clip_by_value(image, vmin, vmax) if clip_values else image


@image_op
def vgg_value_range(
    image: tf.Tensor,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> tf.Tensor:
    """Subtracts the channel means of ImageNet and divides by the deviations (fractions of 255)."""
    if min(std) <= 0:
        raise ValueError(f"std={std}: write numbers above 0")
    mean, std = (tf.constant(statistic, tf.float32) * 255 for statistic in (mean, std))
    return (tf.cast(image, tf.float32) - mean) / std


@image_op
def clip_value_range(image: tf.Tensor) -> tf.Tensor:
    """Normalizes with the channel means and deviations of CLIP's image towers."""
    return vgg_value_range(
        image,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
