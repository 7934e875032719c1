"""The color operations of DINO's crops: what they do, how often, and inside `views`."""

import colorsys

import numpy as np
import pytest
from op_runs import ARRAYS, apply, apply_to_image, draw
from PIL import Image, ImageOps

from vit_jax.data import pp
from vit_jax.errors import UserError

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
JITTER = "color_jitter(0.4, 0.4, 0.2, hue=0.1, probability=0.8)"


def test_turning_the_hue_is_that_of_the_hsv_model():
    from vit_jax.data.ops._kernels import turn_hue

    grays = np.arange(0, 256, 5, np.uint8)[:, None, None].repeat(3, axis=2)
    image = np.concatenate([IMAGE.reshape(-1, 1, 3), grays])
    for turn in (-0.5, -0.07, 0.0, 0.1, 0.45):
        turned = []
        for pixel in image[:, 0] / 255:
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            turned.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
        ours = turn_hue(image, np.float32(turn))[:, 0]
        np.testing.assert_allclose(ours, 255 * np.array(turned), atol=0.501)  # Rounded.


def test_jitter_turns_the_hue_within_its_bounds():
    red = np.uint8([[[200, 40, 40]]])
    colors = [x[0, 0] / 255 for x in draw("color_jitter(hue=0.1)", red, 200)]
    hues = np.array([(colorsys.rgb_to_hsv(*color)[0] + 0.5) % 1 - 0.5 for color in colors])
    assert -0.103 < hues.min() < -0.09
    assert 0.09 < hues.max() < 0.103


@pytest.mark.parametrize(
    ("op", "share"),
    [(JITTER, 0.8), ("grayscale(0.2)", 0.2), ("solarize(0.2)", 0.2), ("gaussian_blur(0.5)", 0.5)],
)
def test_an_op_changes_its_share_of_images_and_no_others(op, share):
    changed = [not np.array_equal(x, IMAGE) for x in draw(op, IMAGE, 250)]
    # A blur with a deviation below 0.27 pixels changes no value.
    assert np.mean(changed) == pytest.approx(share, abs=0.1)
    for wrong in ("1.5", "-0.1"):
        text = op.replace(str(share), wrong)
        with pytest.raises(UserError, match="write a number from 0 to 1"):
            apply_to_image(text, IMAGE)


def test_gray_and_solarized_images_are_those_of_pil():
    gray = np.asarray(Image.fromarray(IMAGE).convert("L"))[..., None]
    np.testing.assert_allclose(apply_to_image("grayscale", IMAGE), gray.repeat(3, 2), atol=1)
    solarized = np.asarray(ImageOps.solarize(Image.fromarray(IMAGE)))
    np.testing.assert_array_equal(apply_to_image("solarize", IMAGE), solarized)
    one = IMAGE[..., :1]
    np.testing.assert_array_equal(apply_to_image(f"grayscale|{JITTER}", one).shape, one.shape)


def test_a_blur_has_a_deviation_within_its_range_and_ends_at_its_radius():
    point = np.zeros((23, 23, 1), np.uint8)
    point[11, 11] = 255
    places = np.arange(-11, 12)
    deviations = []
    for blurred in draw("gaussian_blur(1.0, 0.5, 1.0, radius=4)", point, 60):
        shares = blurred[..., 0].sum(0) / blurred.sum()
        deviations.append(np.sqrt((shares * places**2).sum()))
        assert not shares[abs(places) > 4].any()
    assert 0.4 < min(deviations) < 0.6
    assert 0.85 < max(deviations) < 1.05
    for wrong in ("0.5, 1.0, 0.5", "0.5, 0.0, 1.0", "radius=0"):
        with pytest.raises(UserError, match="write a range above 0"):
            apply_to_image(f"gaussian_blur({wrong})", IMAGE)


def test_views_of_one_name_are_appended_and_are_those_of_their_ops_alone():
    from vit_jax.data.host_tensorflow import tf

    first = "random_crop(8)|flip_lr|color_jitter(0.4, 0.4, 0.2, hue=0.1)|gaussian_blur"
    second = "random_crop(8)|solarize|grayscale(0.2)"
    spec = f"views('crops', 2, '{first}')|views('crops', 1, '{second}')|keep('crops')"
    found = apply(spec, {"image": IMAGE})["crops"]
    wanted = []
    keys = tf.unstack(tf.random.split((1, 2)))
    for key, count, inner in zip(keys, (2, 1), (first, second), strict=True):
        prepare = pp.build(inner)
        for own in tf.unstack(tf.random.split(key, count)):
            wanted.append(prepare({"image": tf.constant(IMAGE)}, own)["image"])
    np.testing.assert_array_equal(found, np.stack(wanted))


def test_views_of_images_whose_sizes_differ_until_the_last_op():
    spec = "views('crops', 3, 'inception_crop|color_jitter(0.4)|resize(6)')"
    crops = apply(spec, {"image": ARRAYS["small"]})["crops"]
    assert crops.shape == (3, 6, 6, 3)
    assert len({crop.tobytes() for crop in crops}) == 3
