"""RandAugment: each operation bit for bit as recorded from big_vision, and the draws."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import sampled
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.augment import randaugment as _randaugment
from vit_jax.augment.strengths import OPERATIONS
from vit_jax.data import pp
from vit_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden/big_vision"
CASES = json.loads((GOLDEN / "randaug_ops.json").read_text())["cases"]
ARRAYS = sampled.load(GOLDEN / "randaug_ops.npz")


def run(operation, image, *, magnitude, sign=1.0, place=(0, 0), corrected=False):
    """One of the 16 operations."""
    from vit_jax.data.ops._kernels import augment
    from vit_jax.data.ops.randaugment import at_strength

    draws = np.int32([[[OPERATIONS.index(operation), sign < 0, *place]]])
    operations = at_strength(magnitude / 10, image.shape[:2], corrected)
    return augment(image[None], draws, operations)[0]


def draw(spec, image, count):
    from vit_jax.data.host_tensorflow import tf

    preprocess, image = pp.build(spec), tf.constant(image)
    dataset = tf.data.Dataset.range(count).map(
        lambda n: preprocess({"image": image}, tf.stack([tf.cast(n, tf.int32), 5]))["image"]
    )
    return list(dataset.as_numpy_iterator())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_operations_bit_for_bit(case):
    sign = -1.0 if case["args"] and case["args"][0] < 0 else 1.0
    image = ARRAYS[case["input_array"]]
    ours = run(case["op"], image, magnitude=case["magnitude"], sign=sign)
    assert (ours.shape, ours.dtype) == (image.shape, image.dtype)
    sampled.assert_close(ours, ARRAYS[case["key"]])


def test_recorded_cases_cover_all_operations_but_cutout():
    assert {case["op"] for case in CASES} == {*OPERATIONS} - {"Cutout"}


@pytest.mark.parametrize(
    ("place", "rows", "columns"),
    [
        ((40, 50), slice(20, 60), slice(30, 70)),
        ((3, 97), slice(0, 23), slice(77, 100)),
        ((89, 0), slice(69, 90), slice(0, 20)),
    ],
)
def test_cutout_greys_a_square_that_may_reach_over_the_border(place, rows, columns):
    image = np.zeros((90, 100, 3), np.uint8)
    expected = image.copy()
    expected[rows, columns] = 128
    np.testing.assert_array_equal(run("Cutout", image, magnitude=5, place=place), expected)


def test_holes_are_anywhere():
    black, centres = np.zeros((90, 100, 3), np.uint8), []
    for image in draw("randaug(1, 5)", black, 1600):
        if set(np.unique(image)) == {0, 128} and not image[:, :, 0].all(1).any():
            hidden = (image == 128).all(-1)
            centres.append([np.flatnonzero(hidden.any(axis)).mean() for axis in (1, 0)])
    assert len(centres) > 50
    np.testing.assert_allclose(np.mean(centres, 0), [45, 50], atol=8)
    assert np.std(centres, axis=0).min() > 15


def test_every_operation_is_drawn_about_equally_often():
    image = ARRAYS["img"]
    signed = [
        run(operation, image, magnitude=7, sign=sign).tobytes()
        for operation in OPERATIONS
        if operation != "Cutout"  # Whose squares are anywhere.
        for sign in (1.0, -1.0)
    ]
    drawn = [x.tobytes() for x in draw("randaug(1, 7)", image, 640)]
    counts = {x: drawn.count(x) for x in dict.fromkeys(signed)}
    # 15 operations with a result of their own, each expected 40 times (geometry: 20 a sign).
    assert 20 < 640 - sum(counts.values()) < 70
    # But for the two that move this image all the way out.
    assert 50 < counts.pop(np.full_like(image, 128).tobytes()) < 110
    assert min(counts.values()) >= 6
    assert max(counts.values()) <= 70


def test_layers_are_drawn_independently():
    image = ARRAYS["img_flatch"]
    invert_twice = [np.array_equal(x, image) for x in draw("randaug(2, 5)", image, 400)]
    # At strength 5 four operations do nothing: both do nothing, or cancel, now and then.
    assert 10 < sum(invert_twice) < 100
    assert all(np.array_equal(x, image) for x in draw("randaug(0, 5)", image, 3))


def test_draws_are_pinned():
    # A change here changes the images of every training run ever recorded.
    from vit_jax.data.host_tensorflow import tf
    from vit_jax.data.ops.randaugment import _draw

    image = tf.zeros([224, 224, 3], tf.uint8)
    draws = [_draw(tf.constant(seed), image).numpy().tolist() for seed in [(1, 2), (-3, 4)]]
    assert draws == [[11, 0, 133, 190], [10, 0, 206, 107]]


@pytest.mark.parametrize(
    ("magnitude", "corrected"),
    [*((magnitude, False) for magnitude in (*range(21), 29)), (13, True), (15.5, True)],
)
def test_on_the_device_the_operations_are_the_same(magnitude, corrected):
    """Also at magnitudes of which no golden was recorded."""
    image = ARRAYS["img"]
    apply = functools.partial(_randaugment.apply, magnitude=magnitude, corrected=corrected)
    places = np.float32([[3, 70]] * 32)
    found = np.asarray(
        jax.jit(apply)(np.stack([image] * 32), np.arange(32) % 16, np.arange(32) // 16, places)
    )
    for number, operation in enumerate(2 * OPERATIONS):
        sign = -1.0 if number >= 16 else 1.0
        fields = {"magnitude": magnitude, "sign": sign, "place": (3, 70), "corrected": corrected}
        expected = run(operation, image, **fields)
        np.testing.assert_array_equal(found[number], expected, err_msg=operation)


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_greys_are_tensorflows(step):
    """Checks a thirtieth of the colors, or all of them, also on the device."""
    from vit_jax.data.host_tensorflow import tf
    from vit_jax.data.ops import _kernels

    levels = np.arange(0, 256, step, dtype=np.uint8)
    grey = jax.jit(_randaugment._grey)
    for red in levels:
        colours = np.stack(np.broadcast_arrays(red, *np.meshgrid(levels, levels)), -1)
        expected = tf.image.rgb_to_grayscale(tf.constant(colours)).numpy()
        np.testing.assert_array_equal(_kernels.grayscale(colours), expected.repeat(3, -1))
        np.testing.assert_array_equal(grey(colours[None])[0], expected)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_other_channels(channels):
    """Each channel becomes what it becomes in an image of three, but for what mixes colours."""
    image = ARRAYS["img"][..., :1]
    for operation in OPERATIONS:
        ours = run(operation, image.repeat(channels, -1), magnitude=7)
        if operation == "Color":
            np.testing.assert_array_equal(ours, image.repeat(channels, -1))
        else:
            of_three = run(operation, image.repeat(3, -1), magnitude=7)
            np.testing.assert_array_equal(ours, of_three[..., :1].repeat(channels, -1))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_images_of_every_size(height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    for operation in OPERATIONS:
        place = (seed % height, seed % width)
        ours = run(operation, image, magnitude=10, sign=(-1) ** seed, place=place)
        assert ours.shape == image.shape
        if operation == "Sharpness":
            np.testing.assert_array_equal(ours[[0, -1]], image[[0, -1]])
            np.testing.assert_array_equal(ours[:, [0, -1]], image[:, [0, -1]])
        if operation in ("TranslateX", "TranslateY"):
            assert (ours == 128).all()


def test_corrected_variant_differs_where_it_says():
    image = ARRAYS["img"]

    def corrected(operation, magnitude=10):
        return run(operation, image, magnitude=magnitude, corrected=True)

    different = {
        operation
        for operation in OPERATIONS
        if not np.array_equal(run(operation, image, magnitude=10), corrected(operation))
    }
    assert different == {"Solarize", "Contrast", "TranslateX", "TranslateY", "Cutout"}
    moved = corrected("TranslateX")  # By 100 pixels in 224, in proportion.
    shift = round(100 / 224 * image.shape[1])
    np.testing.assert_array_equal(moved[:, :-shift], image[:, shift:])
    np.testing.assert_array_equal(run("Solarize", image, magnitude=10), 255 - image)
    np.testing.assert_array_equal(corrected("Solarize"), image)
    grey = image.astype(np.float32) @ np.float32([0.2989, 0.587, 0.114])
    flat = corrected("Contrast", 0)  # A tenth of the way.
    assert abs(flat.mean() - (0.9 * grey.mean() + 0.1 * image.mean())) < 1.5


@pytest.mark.parametrize("op", ["randaug(2, 10)", "three_augment", "color_jitter(0.3)"])
def test_float_images_are_refused(op):
    with pytest.raises(UserError, match="needs uint8 images, not float32: put it before"):
        draw(f"value_range|{op}", ARRAYS["img"], 1)


def test_grey_images_pass():
    image = ARRAYS["img"][..., :1]
    assert {x.shape for x in draw("randaug(2, 10)", image, 40)} == {image.shape}
