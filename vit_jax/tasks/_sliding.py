"""Dense predictions for images of other sizes than the model takes: windows, scales, mirroring."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.types import Array

DensePredictor = Callable[[Array], Array]
"""Images `[b, h, w, channels]` to logits `[b, h, w, classes]`."""


def covers(stride: Sequence[int], window: Sequence[int]) -> bool:
    """Returns whether windows that start every `stride` pixels (down, right) cover all pixels."""
    if len(stride) != len(window):
        return False
    return all(0 < step <= size for step, size in zip(stride, window, strict=True))


def slide(
    predict: DensePredictor, images: Array, window: Sequence[int], stride: Sequence[int]
) -> Array:
    """Returns logits `[b, H, W, classes]`: the mean over all windows that contain a pixel.

    Windows start every `stride` pixels, which must cover the image (see `covers`), the last one at
    the far border. Images smaller than a window are padded with zeros, the middle of the range of
    normalized images.
    """
    height, width = images.shape[1:3]
    missing = [max(0, size - side) for size, side in zip(window, (height, width), strict=True)]
    padded = jnp.pad(images, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
    starts = [
        _starts(side, size, step)
        for side, size, step in zip(padded.shape[1:3], window, stride, strict=True)
    ]
    corners = np.array([(y, x) for y in starts[0] for x in starts[1]])
    counts = np.zeros(padded.shape[1:3], np.float32)
    for y, x in corners:
        counts[y : y + window[0], x : x + window[1]] += 1
    batch = images.shape[0]

    def crop(x: Array, corner: Array) -> Array:
        start = (0, corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(x, start, (batch, *window, x.shape[-1]))

    def add(sums: Array, corner: Array) -> tuple[Array, None]:
        sums_here = crop(sums, corner) + predict(crop(padded, corner))
        return jax.lax.dynamic_update_slice(sums, sums_here, (0, corner[0], corner[1], 0)), None

    shape = jax.eval_shape(
        predict, jax.ShapeDtypeStruct((batch, *window, images.shape[-1]), images.dtype)
    )
    sums = jnp.zeros((*padded.shape[:3], shape.shape[-1]), jnp.float32)
    sums, _ = jax.lax.scan(add, sums, jnp.asarray(corners))
    return (sums / counts[None, :, :, None])[:, :height, :width]


def over_scales(
    predict: DensePredictor, images: Array, scales: Sequence[float], mirror: bool
) -> Array:
    """Returns mean class probabilities `[b, H, W, classes]` over resized and mirrored images."""
    batch, height, width, channels = images.shape
    total: Array | float = 0.0
    for scale in scales:
        sides = max(1, round(height * scale)), max(1, round(width * scale))
        resized = jax.image.resize(images, (batch, *sides, channels), "bilinear")
        for flipped in (False, True) if mirror else (False,):
            logits = predict(resized[:, :, ::-1] if flipped else resized)
            logits = logits[:, :, ::-1] if flipped else logits
            shape = (batch, height, width, logits.shape[-1])
            total += jax.nn.softmax(jax.image.resize(logits, shape, "bilinear"))
    return jnp.asarray(total) / (len(scales) * (1 + mirror))


def _starts(side: int, size: int, stride: int) -> list[int]:
    return sorted({min(start, side - size) for start in range(0, side - size + stride, stride)})
