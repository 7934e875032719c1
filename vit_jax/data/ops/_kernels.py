"""Compiled loops over images: RandAugment, color jitter, and their operations.

Images are uint8 `[h, w, c]`, C-contiguous, on input and output. Results of float computations are
truncated, not rounded, and every sum and product is rounded to float32, because published models
were trained this way. Numba compiles the kernels at their first use and caches them next to this
file, or in the user's cache. Numba recompiles a function only when its own file changes, so callers
are in the same file; only `_filters` calls some of them from outside. They run without Python's
global lock. This module is imported only when
it is needed, because Numba takes half a second to load.

Kernels iterate over slices instead of adding offsets to an index, because Numba would have to check
whether such an index is negative.
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
    except RuntimeError:  # No folder for the cache of compiled code can be written.
        return njit(nogil=True, error_model="numpy")(function)


@intrinsic
def _fused(_typing, a, b, c):
    """Returns `a * b + c`, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda _context, builder, _signature, args: builder.fma(*args)


@kernel
def to_byte(value):
    """Clips a value to 0..255, then truncates it to uint8."""
    value = value if value > F(0) else F(0)
    return np.uint8(np.int32(value if value < F(255) else F(255)))


@kernel
def blend(start, value, factor):
    """Interpolates from `start` (factor 0) to `value` (factor 1), or extrapolates beyond."""
    return to_byte(start + factor * (value - start))


@kernel
def assign(images, number, image):
    """Assigns `images[number] = image`, ten times faster than Numba's own assignment."""
    target, values = images.reshape(len(images), -1)[number], image.ravel()
    for i in range(len(target)):
        target[i] = values[i]


# Operations that depend on one value: they use tables, uint8 `[c, 256]`.


@kernel
def look_up(image, tables):
    """Replaces each value by its entry in the table of its channel."""
    out = np.empty_like(image)
    for channel, table in enumerate(tables):
        values, found = _channel(image, channel), _channel(out, channel)
        for i in range(len(values)):
            found[i] = table[values[i]]
    return out


@kernel
def _channel(image, channel):
    """Returns the values of a channel as a view `[h * w]`."""
    return image.reshape(-1, image.shape[2])[:, channel]


@kernel
def same_for(num_channels, table):
    """Repeats a table, uint8 `[256]`, for each channel: uint8 `[num_channels, 256]`."""
    tables = np.empty((num_channels, 256), np.uint8)
    tables[:] = table
    return tables


@kernel
def count(image):
    """Counts the occurrences of each value in each channel: int32 `[c, 256]`."""
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
    """Scales the brightness: factor 0 gives black, factor 1 the image itself."""
    return _away_from(F(0), image, factor)


@kernel
def contrast(image, factor):
    """Scales the contrast: factor 0 gives the mean gray of the image, factor 1 the image itself."""
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


# Operations that depend on one pixel.


@kernel
def _luma(line):
    """Returns the luma of a line of RGB pixels, uint8 `[w * 3]`: whole numbers in float32 `[w]`.

    It is rounded as in TensorFlow, which computes in 0..1 and multiplies by 255.5 at the end.
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
    """Replaces every channel by the luma; a gray image is unchanged."""
    return color(image, F(0))


@kernel
def color(image, factor):
    """Scales the saturation: factor 0 gives gray, factor 1 the image itself."""
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
def turn_hue(image, turn):
    """Adds `turn`, a share of the circle of hues, to the hue of each pixel; grays stay as they are.

    The largest and the smallest of the three values stay, as in the HSV model.
    """
    if image.shape[2] != 3:
        return image
    out = image.copy()
    pixels, found = image.reshape(-1, 3), out.reshape(-1, 3)
    for i in range(len(pixels)):
        red, green, blue = F(pixels[i, 0]), F(pixels[i, 1]), F(pixels[i, 2])
        highest, lowest = max(red, green, blue), min(red, green, blue)
        chroma = highest - lowest
        if chroma == F(0):
            continue
        if highest == red:
            sixths = (green - blue) / chroma
        elif highest == green:
            sixths = (blue - red) / chroma + F(2)
        else:
            sixths = (red - green) / chroma + F(4)
        for channel in range(3):
            place = (sixths + F(6) * turn + F(5 - 2 * channel)) % F(6)
            share = max(F(0), min(place, F(4) - place, F(1)))
            found[i, channel] = to_byte(np.rint(highest - chroma * share))
    return out


@kernel
def cutout(image, half_side, row, column):
    """Fills a square of side `2 * half_side` around (row, column) with gray, inside the image."""
    out = image.copy()
    top, left = max(row - half_side, 0), max(column - half_side, 0)
    out[top : max(row + half_side, 0), left : max(column + half_side, 0)] = FILL
    return out


# Operations that depend on the neighbors of a pixel.


@kernel
def sharpness(image, factor):
    """Scales the sharpness: factor 0 gives the image after a 3x3 smoothing filter, factor 1 itself.

    Pixels at the border are unchanged.
    """
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
    """Blends a line with the truncated output of the filter [1 1 1; 1 5 1; 1 1 1] / 13.

    The products are summed row by row with fused multiply-adds, as in the published runs: where the
    sum is a whole multiple of 13, the rounding decides to which number it is truncated.
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


# Operations that move pixels.


@kernel
def warp(image, matrix):
    """Reads the output pixel (x, y) at the input pixel nearest to `matrix @ (x, y, 1)`.

    Pixels from outside the image are `FILL`. Halves are rounded away from zero.

    matrix: float32 `[2, 3]`.
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
    """Rounds like C's `round`.

    It uses double precision, because float32 would round the sum up for numbers just below a half.
    """
    return np.int32(np.float64(place) + np.copysign(0.5, np.float64(place)))


# The drawn operations, applied to several images.

(
    AUTO_CONTRAST, EQUALIZE, _, ROTATE, _, _, COLOR, CONTRAST,
    _, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, CUTOUT, _,
) = range(len(OPERATIONS))  # fmt: skip


@kernel
def augment(images, draws, operations):
    """Applies the drawn operations to each image, one after the other.

    images: uint8 `[b, h, w, c]`.
    draws: int32 `[b, layers, 4]`: the number of the operation, 1 where the strength of a geometric
      operation is negative, the row, and the column.
    operations: the `Operations` for this size of image.
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


BY_BRIGHTNESS, BY_CONTRAST, BY_SATURATION, BY_HUE = range(4)


@kernel
def jitter(images, orders, factors):
    """Changes three or four properties of each image.

    orders: the order of the properties, int32 `[b, properties]`; -1 changes nothing.
    factors: the factor of each property, and of the hue its turn, float32 `[b, properties]`.
    """
    out = np.empty_like(images)
    for number in range(len(images)):
        image = images[number].copy()
        for drawn in orders[number]:
            factor = factors[number, max(drawn, 0)]
            if drawn == BY_BRIGHTNESS:
                image = brightness(image, factor)
            elif drawn == BY_CONTRAST:
                image = contrast(image, factor)
            elif drawn == BY_SATURATION:
                image = color(image, factor)
            elif drawn == BY_HUE:
                image = turn_hue(image, factor)
        assign(out, number, image)
    return out
