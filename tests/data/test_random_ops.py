"""Random preprocessing ops: the ranges they draw from, and a key for each."""

import colorsys

import numpy as np
import pytest
from op_runs import ARRAYS, apply, apply_to_image, draw
from PIL import Image, ImageOps

from vit_jax.data import pp
from vit_jax.errors import UserError


def test_inception_crop_covers_the_areas_and_ratios_it_should():
    # The pixels hold their coordinates, which gives the window away.
    rows, columns = np.mgrid[:100, :120].astype(np.uint8)
    image = np.stack([rows, columns, columns], -1)
    areas, ratios = [], []
    for crop in draw("inception_crop(area_min=10, area_max=60)", image, 200):
        areas.append(crop.shape[0] * crop.shape[1] / 12_000)
        ratios.append(crop.shape[1] / crop.shape[0])
        top, left = crop[0, 0, :2]
        np.testing.assert_array_equal(
            crop, image[top : top + crop.shape[0], left : left + crop.shape[1]]
        )
    assert 0.09 < min(areas) < 0.2
    assert 0.5 < max(areas) < 0.61
    assert 0.72 < min(ratios) < 0.85
    assert 1.2 < max(ratios) < 1.37


def test_torchvisions_sampler_draws_areas_uniformly():
    """TensorFlow's takes smaller windows: it draws the height, given the ratio."""
    image = np.zeros((100, 120, 1), np.uint8)
    spec = "inception_crop(None, 8, ratio_max=1.333333, sampler='torchvision')"
    crops = np.array([crop.shape[:2] for crop in draw(spec, image, 400)])
    areas, ratios = crops.prod(1) / 12_000, np.log(crops[:, 1] / crops[:, 0])
    assert abs(ratios).max() < np.log(1.37)
    assert abs(np.median(ratios)) < 0.06
    # Windows near the whole image often do not fit, which thins the largest.
    shares = np.histogram(areas, [0.08, 0.24, 0.4, 0.56])[0] / 400
    np.testing.assert_allclose(shares, shares.mean(), atol=0.06)
    # In an image too narrow for any ratio it is the center.
    narrow = np.arange(100, dtype=np.uint8)[:, None, None] * np.ones((1, 10, 1), np.uint8)
    crop = draw(spec, narrow, 1)[0]
    assert crop.shape[:2] == (13, 10)
    assert crop[0, 0, 0] == 43


def test_flaxs_sampler_covers_a_tenth_or_takes_the_center():
    from vit_jax.data.host_tensorflow import tf
    from vit_jax.data.ops.geometry import crop_window

    bounds = (8, 100), (0.75, 4 / 3), "flax"

    def window(shape, seed):
        return crop_window(tf.constant(shape), tf.constant((seed, 7)), *bounds).numpy()

    areas = [window([100, 120, 3], seed)[2:].prod() / 12_000 for seed in range(60)]
    assert 0.095 < min(areas) < 0.13
    # No window of 8 % and a ratio from 3/4 fits into an image this narrow.
    assert window([1000, 61, 3], 0).tolist() == [474, 4, 53, 53]


def test_photometric_distortion_keeps_grays_gray_and_changes_what_it_says():
    image = np.full((4, 4, 3), 100, np.uint8)
    grays = np.array(draw("photometric_distortion", image, 200))
    assert (np.ptp(grays, axis=-1) == 0).all()
    values = grays[:, 0, 0, 0]
    # A quarter has neither brightness nor contrast changed.
    assert 0.13 < (values == 100).mean() < 0.4
    assert 34 <= values.min() < 70
    assert 140 < values.max() <= 198
    image[..., 1:] = 60
    colors = np.array(draw("photometric_distortion", image, 200))[:, 0, 0].astype(int)
    assert (colors[:, 0] > colors[:, 1:].max(1)).mean() > 0.95  # Hue turns by 36 degrees at most.
    assert (colors[:, 1] != colors[:, 2]).any()


def test_random_draws_are_pinned():
    # A change here changes the images of every training run ever recorded.
    from vit_jax.data.host_tensorflow import tf
    from vit_jax.data.ops.geometry import crop_window

    windows = [
        crop_window(tf.constant([375, 500, 3]), tf.constant(seed), (5, 100), (0.75, 1.33))
        for seed in [(1, 2), (3, 4), (-5, 6)]
    ]
    assert np.stack(windows).tolist() == [
        [56, 117, 289, 358],
        [2, 126, 371, 331],
        [18, 153, 279, 339],
    ]
    image = np.array([[[0], [1]]], np.uint8)
    flips = [int(x[0, 0, 0]) for x in draw("flip_lr", image, 16)]
    assert flips == [0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1]
    colors = np.array([[[250, 200, 10], [20, 40, 60]]], np.uint8)
    jittered = [
        x[0, 0].tolist() for x in draw("color_jitter(0.4, 0.4, 0.2, hue=0.1)", colors[:, :1], 3)
    ]
    assert jittered == [[242, 235, 32], [255, 154, 89], [212, 207, 26]]
    solarized, gray = [5, 55, 10], [193] * 3
    three = [x[0, 0].tolist() for x in draw("three_augment", colors, 6)]
    assert three == [solarized, gray, gray, solarized, solarized, gray]
    point = np.zeros((13, 13, 1), np.uint8)
    point[6, 6] = 255
    blurred = [int(x[6, 6, 0]) for x in draw("gaussian_blur(0.5, 0.5, 1.5)", point, 8)]
    assert blurred == [255, 255, 22, 255, 140, 255, 23, 255]
    places = np.stack(np.mgrid[:100, :120], -1).astype(np.uint8)
    crops = draw("inception_crop(None, 8, ratio_max=1.333333, sampler='torchvision')", places, 3)
    assert [[*x[0, 0].tolist(), *x.shape[:2]] for x in crops] == [
        [41, 52, 59, 57],
        [13, 43, 72, 72],
        [8, 3, 92, 115],
    ]


def test_random_crop_pads_and_keeps_the_size():
    image = np.full((8, 8, 3), 255, np.uint8)
    crops = np.stack(draw("random_crop(8, padding=2)", image, 20))
    assert crops.shape == (20, 8, 8, 3)
    visible = (crops > 0).sum((1, 2, 3)) / 3
    assert visible.min() >= 36
    assert len(set(visible)) > 1


def test_flip_mirrors_half_of_the_images():
    image = np.arange(12, dtype=np.uint8).reshape(2, 6, 1)
    flipped = 0
    for ours in draw("flip_lr", image, 200):
        is_flipped = np.array_equal(ours, image[:, ::-1])
        assert is_flipped or np.array_equal(ours, image)
        flipped += is_flipped
    assert 70 < flipped < 130


class TestRandomAffine:
    def test_does_nothing_when_nothing_is_asked_for(self):
        image = ARRAYS["small"]
        np.testing.assert_array_equal(apply_to_image("random_affine()", image), image)

    def test_grey_images_and_floats_keep_their_type(self):
        image = ARRAYS["small"][..., :1]
        assert apply_to_image("random_affine(rotate=20)", image).shape == image.shape
        ours = apply_to_image("value_range|random_affine(rotate=20, fill=-1)", image)
        assert ours.dtype == np.float32

    @pytest.mark.parametrize("options", ["shift=0.2", "rotate=30", "scale=0.3", "shear=20"])
    def test_moves_within_its_bounds_about_the_centre(self, options):
        # The centre of mass of a blob in the middle stays there, but for shifts.
        rows, columns = np.mgrid[-20:21, -20:21]
        image = (255 * np.exp(-((rows / 6) ** 2) - (columns / 3) ** 2))[..., None].astype(
            np.float32
        )
        offsets, masses, tilts = [], [], []
        for ours in draw(f"random_affine({options})", image, 60):
            density = ours[..., 0] / ours.sum()
            y, x = (density * rows).sum(), (density * columns).sum()
            offsets.append((y, x))
            masses.append(ours.sum() / image.sum())
            covariance = (density * (rows - y) * (columns - x)).sum()
            tilts.append(covariance / (density * (rows - y) ** 2).sum())
        offsets, masses = np.array(offsets), np.array(masses)
        if "shift" in options:
            assert np.abs(offsets).max() <= 0.2 * 41
            assert np.abs(offsets).max(0).min() > 0.12 * 41
            assert offsets.min() < 0 < offsets.max()
        else:
            assert np.abs(offsets).max() < 0.2
        if "scale" in options:
            assert 1 / 1.3**2 - 0.02 < masses.min() < 0.75
            assert 1.35 < masses.max() < 1.3**2 + 0.02
        else:
            np.testing.assert_allclose(masses, 1, atol=0.03)
        if "rotate" in options or "shear" in options:
            assert min(tilts) < -0.15
            assert max(tilts) > 0.15
        else:
            assert np.abs(tilts).max() < 0.02


def test_random_crop_can_mirror_the_border():
    image = np.arange(100, dtype=np.uint8).reshape(10, 10, 1) + 1
    crops = np.stack(draw("random_crop(10, padding=3, padding_mode='reflect')", image, 20))
    assert crops.min() > 0


class TestColor:
    def test_jitter_changes_each_property_within_its_bounds(self):
        flat = np.full((12, 12, 3), 100, np.uint8)
        means = [x.mean() for x in draw("color_jitter(brightness=0.3)", flat, 60)]
        assert 69 <= min(means) < 75
        assert 125 < max(means) <= 131
        image = ARRAYS["small"]
        greys = [x.std() / image.std() for x in draw("color_jitter(contrast=0.4)", image, 60)]
        assert 0.55 < min(greys) < 0.7
        spread = np.ptp(image.astype(int), axis=-1).mean()
        spreads = [
            np.ptp(x.astype(int), axis=-1).mean() / spread
            for x in draw("color_jitter(saturation=0.5)", image, 60)
        ]
        assert 0.45 < min(spreads) < 0.65

    def test_jitter_without_strength_changes_nothing(self):
        (ours,) = draw("color_jitter", ARRAYS["small"], 1)
        np.testing.assert_array_equal(ours, ARRAYS["small"])

    def test_jitter_applies_its_changes_in_any_order(self):
        # Brightness then saturation clips differently from the other way round.
        image = np.array([[[250, 200, 10]]], np.uint8)
        ours = draw("color_jitter(0.5, 0.5, 0.5)", image, 200)
        assert len(np.unique(np.stack(ours), axis=0)) > 150

    def test_three_augment_does_one_of_three(self):
        image = ARRAYS["small"]
        solarized = np.where(image < 128, image, 255 - image)
        kinds = {"grey": 0, "solarized": 0, "blurred": 0}
        for ours in draw("three_augment", image, 90):
            if (np.ptp(ours, axis=-1) == 0).all():
                kinds["grey"] += 1
            elif np.array_equal(ours, solarized):
                kinds["solarized"] += 1
            else:
                kinds["blurred"] += 1
                assert abs(ours.mean() - image.mean()) < 1
        assert all(15 <= count <= 45 for count in kinds.values())

    def test_blur_is_a_gaussian(self):
        from vit_jax.data.ops._filters import gaussian_blur

        image = np.zeros((21, 21, 1), np.uint8)
        image[10, 10] = 255
        ours = gaussian_blur(image, np.float32(1.5), 6)[..., 0]
        y, x = np.mgrid[-10:11, -10:11]
        expected = 255 * np.exp(-(x**2 + y**2) / (2 * 1.5**2)) / (2 * np.pi * 1.5**2)
        np.testing.assert_allclose(ours, expected, atol=0.6)

    @pytest.mark.parametrize("shape", [(5, 30, 3), (30, 4, 3), (1, 1, 2)])
    def test_blur_mirrors_the_border(self, shape):
        from vit_jax.data.ops._filters import gaussian_blur

        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        weights = np.exp(-(np.arange(-6.0, 7) ** 2) / (2 * 1.3**2))
        expected = np.pad(image.astype(float), [(6, 6), (6, 6), (0, 0)], "symmetric")
        for axis in (0, 1):
            windows = np.lib.stride_tricks.sliding_window_view(expected, 13, axis)
            expected = windows @ (weights / weights.sum())
        ours = gaussian_blur(image, np.float32(1.3), 6)
        np.testing.assert_allclose(ours, expected, atol=0.51)  # Rounded.


def test_each_random_op_has_a_key_of_its_own():
    # With one key for both, the second flip would always undo the first.
    image = ARRAYS["small"]
    flipped = [not np.array_equal(x, image) for x in draw("flip_lr|flip_lr", image, 100)]
    assert 30 < sum(flipped) < 70


def test_each_view_has_a_key_of_its_own():
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    record = {"image": image, "label": np.int32(3)}
    spec = "views('local', 3, 'random_crop(4)|color_jitter(0.4)')|flip_lr"
    found = apply(spec, record)
    assert found["local"].shape == (3, 4, 4, 3)
    assert found["image"].shape == (12, 12, 3)
    assert len({view.tobytes() for view in found["local"]}) == 3
    np.testing.assert_array_equal(apply(spec, record)["local"], found["local"])
    assert (apply(spec, record, seed=(1, 3))["local"] != found["local"]).any()
    with pytest.raises(UserError, match="count=0: write 1 or more"):
        apply("views('local', 0, 'flip_lr')", record)


# The colors of DINO's crops.

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
    # The coin of a blur does not choose among the deviations: these are 1.4 and 0.6 or so.
    centers = [int(x[11, 11, 0]) for x in draw("gaussian_blur(0.5, 0.5, 1.5)", point, 60)]
    assert min(centers) < 28
    assert max(center for center in centers if center < 255) > 63
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
