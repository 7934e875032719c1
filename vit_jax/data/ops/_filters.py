"""Compiled loops over images: grayscale, solarization and Gaussian blur, of which each gets one.

See `_kernels` for what compiled loops have in common. Numba does not notice when a function of that
file changes which this one calls: save this file, too, after a change of `to_byte`, `assign`,
`grayscale` or `solarize`.
"""

import numpy as np

from vit_jax.data.ops._kernels import F, assign, grayscale, kernel, solarize, to_byte


@kernel
def gaussian_blur(image, sigma, radius):
    """Convolves with a Gaussian of `sigma` pixels, cut off at `radius`; the border is mirrored."""
    height, width, num_channels = image.shape
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(F)
    lines = image.reshape(height, -1)
    out = np.empty_like(lines)
    padded = np.empty((width + 2 * radius) * num_channels, F)
    blurred = np.empty(width * num_channels, F)
    margin = radius * num_channels
    for y in range(height):
        inside = padded[margin : margin + width * num_channels]
        inside[:] = 0
        for tap in range(2 * radius + 1):
            _add_line(inside, lines[_mirrored(y + tap - radius, height)], weights[tap])
        for x in range(-radius, 0):
            for channel in range(num_channels):
                right = width - 1 - x
                padded[(x + radius) * num_channels + channel] = inside[
                    _mirrored(x, width) * num_channels + channel
                ]
                padded[(right + radius) * num_channels + channel] = inside[
                    _mirrored(right, width) * num_channels + channel
                ]
        blurred[:] = 0
        for tap in range(2 * radius + 1):
            _add_line(blurred, padded[tap * num_channels :], weights[tap])
        line = out[y]
        for i in range(len(line)):
            line[i] = to_byte(np.rint(blurred[i]))
    return out.reshape(image.shape)


@kernel
def _add_line(total, line, weight):
    for i in range(len(total)):
        total[i] += F(line[i]) * weight


@kernel
def _mirrored(place, side):
    """Returns the index inside `0..side - 1` at which a mirrored index is read.

    The pixel at the border is repeated. The index may be many sides outside.
    """
    place = place % (2 * side)
    return place if place < side else 2 * side - 1 - place


GRAYSCALE, SOLARIZATION, BLUR = range(3)


@kernel
def filtered(images, drawn, sigmas, radii):
    """Applies one of three operations to each image, or none.

    drawn: the number of the operation, int32 `[b]`; -1 for none.
    sigmas: the standard deviation of the blur, float32 `[b]`.
    radii: the pixels at which the blur is cut off, int32 `[b]`.
    """
    out = np.empty_like(images)
    for number in range(len(images)):
        image = images[number].copy()
        if drawn[number] == GRAYSCALE:
            image = grayscale(image)
        elif drawn[number] == SOLARIZATION:
            image = solarize(image, 128)
        elif drawn[number] == BLUR:
            image = gaussian_blur(image, sigmas[number], radii[number])
        assign(out, number, image)
    return out
