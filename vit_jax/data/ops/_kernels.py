"""Images in compiled loops: RandAugment, 3-Augment, colour jitter, and what they choose from.

uint8 `[h, w, c]` in and out, C-contiguous. Where a computation is in floats, its result is
truncated, not rounded, and every sum and product is rounded to float32: published models were
trained so. Compiled by Numba at the first use and kept beside this file, or in the user's cache;
all in one file, because only its own changes have it compiled anew. They run without Python's lock.
Imported when it is needed, because Numba takes half a second to load.

Kernels read along slices, not with offsets to an index, which Numba would have to check for being
negative.
"""

from collections.abc import Callable

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from vit_jax.augment.strengths import FILL, OPERATIONS

F = np.float32


def kernel(function: Callable) -> Callable:
    """Compiles a function of numbers and arrays."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # There is nowhere to keep what was compiled.
        return njit(nogil=True, error_model="numpy")(function)


@intrinsic
def _fused(_typing, a, b, c):
    """`a * b + c`, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda _context, builder, _signature, args: builder.fma(*args)


@kernel
def to_byte(value):
    """Clips, then truncates."""
    value = value if value > F(0) else F(0)
    return np.uint8(np.int32(value if value < F(255) else F(255)))


@kernel
def blend(start, value, factor):
    """From `start` (factor 0) to `value` (1) and beyond."""
    return to_byte(start + factor * (value - start))


@kernel
def assign(images, number, image):
    """`images[number] = image`, which Numba would do ten times slower."""
    target, values = images.reshape(len(images), -1)[number], image.ravel()
    for i in range(len(target)):
        target[i] = values[i]


# Operations that look at one value: tables, uint8 `[c, 256]`.


@kernel
def look_up(image, tables):
    """What each channel's table says of each value."""
    out = np.empty_like(image)
    for channel, table in enumerate(tables):
        values, found = _channel(image, channel), _channel(out, channel)
        for i in range(len(values)):
            found[i] = table[values[i]]
    return out


@kernel
def _channel(image, channel):
    """A channel's values as a view `[h * w]`."""
    return image.reshape(-1, image.shape[2])[:, channel]


@kernel
def same_for(num_channels, table):
    """A table, uint8 `[256]`, once for each channel."""
    tables = np.empty((num_channels, 256), np.uint8)
    tables[:] = table
    return tables


@kernel
def count(image):
    """How often each value occurs in each channel: int32 `[c, 256]`."""
    counts = np.zeros((image.shape[2], 256), np.int32)
    for channel, of_channel in enumerate(counts):
        for value in _channel(image, channel):
            of_channel[value] += 1
    return counts


@kernel
def auto_contrast(image):
    """Stretches each channel to 0..255; a channel of one value stays as it is."""
    tables = np.empty((image.shape[2], 256), np.uint8)
    for channel, counts in enumerate(count(image)):
        low, high = 0, 255
        while not counts[low]:
            low += 1
        while not counts[high]:
            high -= 1
        scale = F(255) / F(high - low) if high > low else F(1)
        offset = F(low) * scale if high > low else F(0)
        for value in range(256):
            tables[channel, value] = to_byte(F(value) * scale - offset)
    return look_up(image, tables)


@kernel
def equalize(image):
    """Spreads the values of each channel so that all occur about equally often."""
    tables = np.empty((image.shape[2], 256), np.uint8)
    for channel, counts in enumerate(count(image)):
        highest = 255
        while not counts[highest]:
            highest -= 1
        step = (counts.sum() - counts[highest]) // 255
        below = step // 2
        for value in range(256):
            if step == 0:
                tables[channel, value] = value
            else:
                tables[channel, value] = min(below // step, 255) if value else 0
            below += counts[value]
    return look_up(image, tables)


@kernel
def solarize(image, threshold):
    """Inverts the values from `threshold` on."""
    out = np.empty_like(image)
    values, found = image.ravel(), out.ravel()
    for i in range(len(values)):
        found[i] = values[i] ^ np.uint8(255 * (values[i] >= threshold))
    return out


@kernel
def brightness(image, factor):
    """0 is black, 1 the image."""
    return _away_from(F(0), image, factor)


@kernel
def contrast(image, factor):
    """0 is the image's mean grey, 1 the image."""
    grey = grayscale(image)
    total = 0
    for value in grey.ravel():
        total += value
    return _away_from(F(total / grey.size), image, factor)


@kernel
def _away_from(grey, image, factor):
    table = np.empty(256, np.uint8)
    for value in range(256):
        table[value] = blend(grey, F(value), factor)
    return look_up(image, same_for(image.shape[2], table))


# Operations that look at one pixel.


@kernel
def _luma(line):
    """Greys of a line of RGB pixels, uint8 `[w * 3]`: whole numbers in float32 `[w]`.

    With the roundings of TensorFlow, which goes through 0..1 and comes back by way of 255.5.
    """
    luma = np.empty(len(line) // 3, F)
    red, green, blue = line[::3], line[1::3], line[2::3]
    scale = F(1 / 255)
    for i in range(len(luma)):
        weighted = F(red[i]) * scale * F(0.2989) + F(green[i]) * scale * F(0.587)
        luma[i] = np.floor((weighted + F(blue[i]) * scale * F(0.114)) * F(255.5))
    return luma


@kernel
def grayscale(image):
    """Luma in every channel; a grey image stays as it is."""
    return color(image, F(0))


@kernel
def color(image, factor):
    """Saturation: 0 is grey, 1 the image."""
    height, width, num_channels = image.shape
    if num_channels != 3:
        return image
    out = np.empty_like(image)
    lines, found = image.reshape(height, -1), out.reshape(height, -1)
    luma = np.empty(3 * width, F)
    for y in range(height):
        of_pixel = _luma(lines[y])
        for x in range(width):
            luma[3 * x] = luma[3 * x + 1] = luma[3 * x + 2] = of_pixel[x]
        line, found_line = lines[y], found[y]
        for i in range(len(line)):
            found_line[i] = blend(luma[i], F(line[i]), factor)
    return out


@kernel
def cutout(image, half_side, row, column):
    """Greys a square of side `2 * half_side` about (row, column), as much of it as is inside."""
    out = image.copy()
    top, left = max(row - half_side, 0), max(column - half_side, 0)
    out[top : max(row + half_side, 0), left : max(column + half_side, 0)] = FILL
    return out


# Operations that look around a pixel.


@kernel
def sharpness(image, factor):
    """0 is smoothed by a 3x3 filter, 1 the image; pixels at the border stay."""
    height, width, num_channels = image.shape
    out = image.copy()
    if height < 3 or width < 3:
        return out
    lines, found = image.reshape(height, -1), out.reshape(height, -1)
    above, here = lines[0].astype(F), lines[1].astype(F)
    for y in range(1, height - 1):
        below = lines[y + 1].astype(F)
        inside = found[y, num_channels:-num_channels]
        _sharpen((above, here, below), num_channels, factor, inside)
        above, here = here, below
    return out


@kernel
def _sharpen(lines, stride, factor, out):
    """Blends a line with what the filter [1 1 1; 1 5 1; 1 1 1] / 13, truncated, makes of it.

    Summed row by row with fused multiply-adds, as the published runs did: where the sum is a whole
    multiple of 13, rounding decides on which side of it truncation sees it.
    """
    above, here, below = lines
    edge, centre = F(1 / 13), F(5 / 13)
    above_1, above_2 = above[stride:], above[2 * stride :]
    here_1, here_2 = here[stride:], here[2 * stride :]
    below_1, below_2 = below[stride:], below[2 * stride :]
    for i in range(len(out)):
        total = above[i] * edge
        total = _fused(above_1[i], edge, total)
        total = _fused(above_2[i], edge, total)
        total = _fused(here[i], edge, total)
        total = _fused(here_1[i], centre, total)
        total = _fused(here_2[i], edge, total)
        total = _fused(below[i], edge, total)
        total = _fused(below_1[i], edge, total)
        total = _fused(below_2[i], edge, total)
        out[i] = blend(np.floor(total), here_1[i], factor)


@kernel
def gaussian_blur(image, sigma):
    """Convolves with a Gaussian of `sigma` pixels, cut off at 6; the border is mirrored."""
    height, width, num_channels = image.shape
    radius = 6
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
    """A place beyond the border, up to many sides away, as one inside; the border's own twice."""
    place = place % (2 * side)
    return place if place < side else 2 * side - 1 - place


# Operations that move pixels.


@kernel
def warp(image, matrix):
    """Output pixel (x, y) is the nearest to `matrix @ (x, y, 1)` of the input; FILL from outside.

    matrix: float32 `[2, 3]`. Halves are rounded away from zero.
    """
    height, width, num_channels = image.shape
    (column_x, column_y, column_0), (row_x, row_y, row_0) = matrix
    outside = np.uint32(height * width)
    sources = np.empty(height * width, np.uint32)
    for y in range(height):
        column_of_line, row_of_line = F(y) * column_y, F(y) * row_y
        line = sources[y * width : (y + 1) * width]
        for x in range(width):
            column = _nearest(F(x) * column_x + column_of_line + column_0)
            row = _nearest(F(x) * row_x + row_of_line + row_0)
            is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            line[x] = np.uint32(row * width + column) if is_inside else outside
    out = np.empty_like(image)
    for channel in range(num_channels):
        values, found = _channel(image, channel), _channel(out, channel)
        for i in range(len(found)):
            found[i] = values[sources[i]] if sources[i] != outside else FILL
    return out


@kernel
def _nearest(place):
    """`round` of C. In double precision, because just below a half the sum would be rounded up."""
    return np.int32(np.float64(place) + np.copysign(0.5, np.float64(place)))


# What is drawn, for several images.

(
    AUTO_CONTRAST, EQUALIZE, _, ROTATE, _, _, COLOR, CONTRAST,
    _, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, CUTOUT, _,
) = range(len(OPERATIONS))  # fmt: skip


@kernel
def augment(images, draws, operations):
    """The drawn operations, one after the other, on each of the images.

    images: uint8 `[b, h, w, c]`. draws: int32 `[b, layers, 4]`: number of the operation, 1 where a
    geometric one goes the other way, row and column. operations: `Operations` for this size.
    """
    enhancement = operations.enhancement
    out = np.empty_like(images)
    num_channels = images.shape[3]
    for number in range(len(images)):
        image = images[number].copy()
        for layer in range(draws.shape[1]):
            drawn, negative, row, column = draws[number, layer]
            if drawn == AUTO_CONTRAST:
                image = auto_contrast(image)
            elif drawn == EQUALIZE:
                image = equalize(image)
            elif drawn == COLOR:
                image = color(image, enhancement)
            elif drawn == CONTRAST and not operations.contrast_by_size:
                image = contrast(image, enhancement)
            elif drawn == SHARPNESS:
                image = sharpness(image, enhancement)
            elif drawn == CUTOUT:
                image = cutout(image, operations.half_side, row, column)
            elif drawn == ROTATE or SHEAR_X <= drawn <= TRANSLATE_Y:
                image = warp(image, operations.matrices[drawn, negative])
            else:
                table = operations.tables[drawn]
                image = look_up(image, same_for(num_channels, table))
        assign(out, number, image)
    return out


BY_BRIGHTNESS, BY_CONTRAST = range(2)


@kernel
def jitter(images, orders, factors):
    """orders: int32 `[b, 3]`, which property comes first. factors: float32 `[b, 3]`."""
    out = np.empty_like(images)
    for number in range(len(images)):
        image = images[number].copy()
        for drawn in orders[number]:
            factor = factors[number, drawn]
            if drawn == BY_BRIGHTNESS:
                image = brightness(image, factor)
            elif drawn == BY_CONTRAST:
                image = contrast(image, factor)
            else:
                image = color(image, factor)
        assign(out, number, image)
    return out


GREYSCALE, SOLARISATION = range(2)


@kernel
def one_of_three(images, drawn, sigmas):
    """drawn: int32 `[b]`, which of the three. sigmas: float32 `[b]`, of the blur."""
    out = np.empty_like(images)
    for number in range(len(images)):
        image = images[number].copy()
        if drawn[number] == GREYSCALE:
            image = grayscale(image)
        elif drawn[number] == SOLARISATION:
            image = solarize(image, 128)
        else:
            image = gaussian_blur(image, sigmas[number])
        assign(out, number, image)
    return out
