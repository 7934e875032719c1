"""timm's RandAugment: its operations at its strengths, and how often and how strongly it draws."""

import numpy as np
import pytest
from op_runs import apply_to_image, draw

from vit_jax.data.ops._increasing import OPERATIONS, augment

FILL = np.array([124, 116, 104], np.uint8)
VALUES = np.arange(256)
RAMP = VALUES.reshape(1, 256, 1).repeat(3, 2).astype(np.uint8)
COLORS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def applied(name, image, share):
    """One operation at a share of the largest magnitude."""
    draws = np.array([[list(OPERATIONS).index(name)]], np.int32)
    fill = FILL[: image.shape[2]]
    return augment(image[None], draws, np.array([[share]], np.float32), fill[None])[0]


# timm/data/auto_augment.py: LEVEL_TO_ARG at the magnitude 9 of `rand-m9`.
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Solarize", np.where(VALUES < 26, VALUES, 255 - VALUES)),
        ("Posterize", np.where(VALUES < 128, 0, 128)),  # One bit.
        ("SolarizeAdd", np.where(VALUES < 128, np.minimum(VALUES + 99, 255), VALUES)),
        ("Invert", 255 - VALUES),
        ("AutoContrast", VALUES),
        ("Color", VALUES),
    ],
)
def test_values_change_as_at_timms_magnitude_9(name, wanted):
    for sign in (-1, 1):
        np.testing.assert_array_equal(applied(name, RAMP, 0.9 * sign)[0, :, 1], wanted)


@pytest.mark.parametrize(("sign", "factor"), [(-1, 0.19), (1, 1.81)])
def test_blends_go_both_ways_from_the_image(sign, factor):
    gray = (COLORS @ np.array([0.299, 0.587, 0.114]))[..., None]
    starts = {"Brightness": 0, "Contrast": np.round(gray.mean()), "Color": np.round(gray)}
    for name, start in starts.items():
        wanted = np.clip(start + factor * (COLORS.astype(float) - start), 0, 255)
        # Truncated to a whole number.
        np.testing.assert_allclose(applied(name, COLORS, 0.9 * sign), wanted - 0.5, atol=1.5)
        np.testing.assert_array_equal(applied(name, COLORS, 0.0), COLORS)
    spread = [applied("Sharpness", COLORS, share).std() for share in (-0.9, 0.0, 0.9)]
    assert spread[0] < spread[1] < spread[2]


def test_pixels_move_as_far_as_timms_and_the_mean_of_imagenet_comes_in():
    height, width, _ = COLORS.shape
    right = applied("TranslateX", COLORS, -0.5)  # 0.45 times one half of 40 pixels.
    np.testing.assert_array_equal(right[:, 9:], COLORS[:, : width - 9])
    assert (right[:, :9] == FILL).all()
    up = applied("TranslateY", COLORS, 0.926)  # 10.0008 pixels.
    np.testing.assert_allclose(up[:-11], COLORS[10:-1].astype(int), atol=1)
    assert (up[height - 10 :] == FILL).all()
    for name, axis in (("ShearX", 0), ("ShearY", 1)):
        moved = (applied(name, np.full((40, 40, 3), 9, np.uint8), 1.0) == FILL).all(2)
        # The far side moves by 0.3 of its distance from the near side.
        np.testing.assert_allclose(moved.sum(1 - axis), 0.3 * (np.arange(40) + 0.5), atol=1)
    turned = applied("Rotate", np.full((41, 41, 3), 9, np.uint8), 0.9)
    assert (turned[0, 0] == FILL).all()
    assert (turned[20] == 9).all()
    assert (applied("Rotate", COLORS, -0.9) != applied("Rotate", COLORS, 0.9)).any()


def test_operations_are_drawn_with_their_probability_at_varied_magnitudes():
    plain = np.full((4, 4, 3), 250, np.uint8)
    changed = [not np.array_equal(x, plain) for x in draw("randaug_increasing(1)", plain, 200)]
    # Six of the operations leave this image as it is, and brightness in half of the draws.
    assert np.mean(changed) == pytest.approx(0.5 * 8.5 / 15, abs=0.1)
    stripes = np.zeros((3, 40, 3), np.uint8)
    stripes[:, ::2] = 200
    varied = draw("randaug_increasing(1, 5, 1.5, probability=1.0)", stripes, 150)
    assert len({int(x.max()) for x in varied}) > 10
    np.testing.assert_array_equal(
        apply_to_image("randaug_increasing(2, probability=0.0)", COLORS), COLORS
    )
    gray = COLORS[..., :1]
    assert {x.shape for x in draw("randaug_increasing(3)", gray, 5)} == {gray.shape}
