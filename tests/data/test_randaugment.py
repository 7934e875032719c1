"""RandAugment: each operation bit for bit as recorded from big_vision, and the draws."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import sampled

from vit_jax.data import pp
from vit_jax.errors import UserError
from vit_jax.tasks import _randaugment

GOLDEN = Path(__file__).parents[1] / "golden/big_vision"
CASES = json.loads((GOLDEN / "randaug_ops.json").read_text())["cases"]
ARRAYS = sampled.load(GOLDEN / "randaug_ops.npz")


def run(choice, image, sign=1.0, seed=(1, 2)):
    """One of the 16 operations inside a tf.data graph."""
    from vit_jax.data.host_tensorflow import tf

    dataset = tf.data.Dataset.from_tensors(image)
    arguments = tf.constant(sign), tf.constant(seed)
    return next(iter(dataset.map(lambda x: choice(x, *arguments)).as_numpy_iterator()))


def draw(spec, image, count):
    from vit_jax.data.host_tensorflow import tf

    preprocess, image = pp.build(spec), tf.constant(image)
    dataset = tf.data.Dataset.range(count).map(
        lambda n: preprocess({"image": image}, tf.stack([tf.cast(n, tf.int32), 5]))["image"]
    )
    return list(dataset.as_numpy_iterator())


def choices(magnitude, corrected=False):
    from vit_jax.data.ops.randaugment import _choices

    return _choices(magnitude, corrected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_operations_bit_for_bit(case):
    sign = -1.0 if case["args"] and case["args"][0] < 0 else 1.0
    image = ARRAYS[case["input_array"]]
    ours = run(choices(case["magnitude"])[case["op"]], image, sign)
    assert (ours.shape, ours.dtype) == (image.shape, image.dtype)
    sampled.assert_close(ours, ARRAYS[case["key"]])


def test_recorded_cases_cover_all_operations_but_cutout():
    covered = {case["op"] for case in CASES}
    assert covered == choices(10).keys() - {"Cutout"}


def test_cutout_greys_a_square_that_may_reach_over_the_border():
    image = np.zeros((90, 100, 3), np.uint8)
    areas, centres = [], []
    for number in range(40):
        hidden = run(choices(5)["Cutout"], image, seed=(number, 0)) == 128
        rows, columns = np.flatnonzero(hidden.any((1, 2))), np.flatnonzero(hidden.any((0, 2)))
        assert hidden.sum() == 3 * len(rows) * len(columns)
        assert len(rows) <= 40
        assert len(columns) <= 40
        areas.append(len(rows) * len(columns))
        centres.append((rows.mean(), columns.mean()))
    assert max(areas) == 1600
    assert min(areas) < 1200
    assert np.std(centres, axis=0).min() > 15


def test_every_operation_is_drawn_about_equally_often():
    image = ARRAYS["img"]
    signed = [
        run(choice, image, sign).tobytes() for choice in choices(7).values() for sign in (1.0, -1.0)
    ]
    drawn = [x.tobytes() for x in draw("randaug(1, 7)", image, 640)]
    counts = {x: drawn.count(x) for x in dict.fromkeys(signed)}
    # 15 operations with a result of their own, each expected 40 times (geometry: 20 a sign).
    without_cutout = list(counts.values())[:-3] + list(counts.values())[-1:]
    assert sum(counts.values()) < 640  # Cutout's squares are elsewhere.
    assert min(without_cutout) >= 6
    assert max(without_cutout) <= 70


def test_layers_are_drawn_independently():
    image = ARRAYS["img_flatch"]
    invert_twice = [np.array_equal(x, image) for x in draw("randaug(2, 5)", image, 400)]
    # At strength 5 four operations do nothing: both do nothing, or cancel, now and then.
    assert 10 < sum(invert_twice) < 100
    assert all(np.array_equal(x, image) for x in draw("randaug(0, 5)", image, 3))


@pytest.mark.parametrize(("magnitude", "corrected"), [(17, False), (13, True)])
def test_on_the_device_the_operations_are_the_same(magnitude, corrected):
    """Beyond the recorded magnitudes."""
    from vit_jax.data.host_tensorflow import tf

    ours, image = choices(magnitude, corrected), ARRAYS["img"]
    names = 2 * _randaugment.OPERATIONS
    apply = functools.partial(_randaugment.apply, magnitude=magnitude, corrected=corrected)
    found = np.asarray(
        jax.jit(apply)(
            np.stack([image] * 32), np.arange(32) % 16, np.arange(32) // 16, np.zeros((32, 2))
        )
    )
    for number, name in enumerate(names):
        if name != "Cutout":
            sign = tf.constant(-1.0 if number >= 16 else 1.0)
            expected = ours[name](tf.constant(image), sign, tf.constant([1, 2]))
            np.testing.assert_array_equal(found[number], expected, err_msg=name)


def test_on_the_device_colours_have_the_same_grey():
    """A thirtieth of the colours."""
    from vit_jax.data.host_tensorflow import tf
    from vit_jax.data.ops import _augmentations

    levels = np.arange(0, 256, 3, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(344, -1, 3)
    grey = jax.jit(_randaugment._grey)(colours[None])[0]
    np.testing.assert_array_equal(grey, _augmentations.grayscale(tf.constant(colours))[..., :1])


def test_corrected_variant_differs_where_it_says():
    image = ARRAYS["img"]
    published, corrected = choices(10), choices(10, corrected=True)
    different = {
        name
        for name in published
        if not np.array_equal(run(published[name], image), run(corrected[name], image))
    }
    assert different == {"Solarize", "Contrast", "TranslateX", "TranslateY", "Cutout"}
    moved = run(corrected["TranslateX"], image)  # By 100 pixels in 224, in proportion.
    shift = round(100 / 224 * image.shape[1])
    np.testing.assert_array_equal(moved[:, :-shift], image[:, shift:])
    np.testing.assert_array_equal(run(published["Solarize"], image), 255 - image)
    np.testing.assert_array_equal(run(corrected["Solarize"], image), image)
    grey = image.astype(np.float32) @ np.float32([0.2989, 0.587, 0.114])
    flat = run(choices(0, corrected=True)["Contrast"], image)  # A tenth of the way.
    assert abs(flat.mean() - (0.9 * grey.mean() + 0.1 * image.mean())) < 1.5


@pytest.mark.parametrize("op", ["randaug(2, 10)", "three_augment", "color_jitter(0.3)"])
def test_float_images_are_refused(op):
    with pytest.raises(UserError, match="needs uint8 images, not float32: put it before"):
        draw(f"value_range|{op}", ARRAYS["img"], 1)


def test_grey_images_pass():
    image = ARRAYS["img"][..., :1]
    assert {x.shape for x in draw("randaug(2, 10)", image, 40)} == {image.shape}
