"""The strengths of RandAugment's operations, against the published formulas in double precision."""

import math

import numpy as np
import pytest

from vit_jax.augment import strengths
from vit_jax.augment.strengths import OPERATIONS

SIZE = (40, 72)
MAGNITUDES = range(31)
VALUES = np.arange(256)


def matrix(operation, magnitude, sign):
    found = strengths.matrices(magnitude / 10, SIZE, False)
    return found[OPERATIONS.index(operation), int(sign < 0)]


def table(operation, magnitude):
    return strengths.fixed_tables(magnitude / 10, SIZE, False)[OPERATIONS.index(operation)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_geometric_strengths_are_rounded_once(magnitude, sign):
    shear = np.float32(sign * (magnitude / 10 * 0.3))
    np.testing.assert_array_equal(matrix("ShearX", magnitude, sign), [[1, shear, 0], [0, 1, 0]])
    np.testing.assert_array_equal(matrix("ShearY", magnitude, sign), [[1, 0, 0], [shear, 1, 0]])

    radians = np.float32(sign * (magnitude / 10 * 30)) * np.float32(math.pi / 180)
    cos, sin = np.float32(math.cos(radians)), np.float32(math.sin(radians))
    np.testing.assert_array_equal(
        matrix("Rotate", magnitude, sign)[:, :2], [[cos, -sin], [sin, cos]]
    )
    centre = (SIZE[1] - 1) / 2, (SIZE[0] - 1) / 2
    moved = matrix("Rotate", magnitude, sign).astype(float) @ [*centre, 1]
    np.testing.assert_allclose(moved, centre, atol=1e-5)

    shift = sign * magnitude * 10
    for operation, row, side in (("TranslateX", 0, SIZE[1]), ("TranslateY", 1, SIZE[0])):
        expected = strengths.IDENTITY.copy()
        expected[row, 2] = np.clip(shift, -side, side)
        np.testing.assert_array_equal(matrix(operation, magnitude, sign), expected)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_strengths_of_colors_are_rounded_once(magnitude):
    level = magnitude / 10
    factor = np.float32(level * 1.8 + 0.1)
    assert strengths.enhancement(level) == factor
    assert strengths.half_side(level, SIZE[0], False) == 4 * magnitude

    threshold = int(level * 256) % 256
    np.testing.assert_array_equal(
        table("Solarize", magnitude), np.where(threshold > VALUES, VALUES, 255 - VALUES)
    )
    added = np.minimum(VALUES + int(level * 110), 255)
    np.testing.assert_array_equal(
        table("SolarizeAdd", magnitude), np.where(VALUES < 128, added, VALUES)
    )
    kept_bits = min(max(int(level * 4), 1), 8)
    step = 2 ** (8 - kept_bits)
    np.testing.assert_array_equal(table("Posterize", magnitude), VALUES // step * step)
    np.testing.assert_array_equal(table("Invert", magnitude), 255 - VALUES)

    def clipped(values):
        return np.clip(values, 0, 255).astype(np.uint8)

    values, grey = np.float32(VALUES), np.float32(SIZE[0] * SIZE[1] // 256)
    np.testing.assert_array_equal(table("Brightness", magnitude), clipped(factor * values))
    np.testing.assert_array_equal(
        table("Contrast", magnitude), clipped(grey + factor * (values - grey))
    )


def test_the_rows_of_other_operations_change_nothing():
    for name in ("AutoContrast", "Equalize", "Rotate", "Color", "Sharpness", "ShearX", "Cutout"):
        np.testing.assert_array_equal(table(name, 13), VALUES)
    for name in OPERATIONS:
        if name[:5] not in ("Rotat", "Shear", "Trans"):
            np.testing.assert_array_equal(matrix(name, 13, 1), strengths.IDENTITY)
