"""Ops on image, segmentation and boxes together: what is marked stays on what it marks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.data import pp
from vit_jax.data.host_tensorflow import tf
from vit_jax.errors import UserError

SIDE = 24


@pytest.mark.parametrize(
    ("spec", "labels", "message"),
    [
        (
            "decode|flip_lr|resize(8)",
            ["boxes"],
            r"'flip_lr' moves .* its boxes; write joint_flip_lr",
        ),
        ("joint_decode|randaug(2, 9)", ["segmentation"], "its segmentation; write photometric"),
        ("decode|central_crop(8)", ["boxes"], "write joint_fit instead"),
    ],
)
def test_an_image_is_not_moved_away_from_its_labels(spec, labels, message):
    with pytest.raises(UserError, match=rf"^config\.data\.pp: .*{message}"):
        pp.check_moves(spec, labels, "config.data.pp")
    pp.check_moves(spec, [], "config.data.pp")


@pytest.mark.parametrize(
    "spec",
    [
        "joint_decode|joint_flip_lr|photometric_distortion|resize(8)",
        "decode|views('local', 2, 'inception_crop(8)|flip_lr')|flip_lr(outkey='other')",
        "central_crop(8)|central_crop(8, key='segmentation')",
    ],
)
def test_images_that_stay_with_their_labels_are_accepted(spec):
    pp.check_moves(spec, ["segmentation"], "config.data.pp")


def record(rectangle=(6, 3, 14, 19), height=SIDE, width=SIDE + 8):
    """A bright rectangle, its mask and its box."""
    y0, x0, y1, x1 = rectangle
    image = np.zeros((height, width, 3), np.uint8)
    image[y0:y1, x0:x1] = 250
    mask = np.zeros((height, width, 1), np.uint8)
    mask[y0:y1, x0:x1] = 2
    box = np.array([y0, x0, y1, x1]) / np.tile((height, width), 2)
    return {
        "image": tf.constant(image),
        "segmentation": tf.constant(mask),
        "boxes": tf.constant([box, np.zeros(4)], tf.float32),
        "box_label": tf.constant([2, -1]),
        "box_crowd": tf.constant([False, False]),
        "box_area": tf.constant([128.0, 0.0]),
    }


def run(text, fields=None, seed=0):
    outputs = pp.build(text)(fields or record(), tf.constant([seed, 1], tf.int32))
    return {key: x.numpy() for key, x in outputs.items()}


def agree(outputs, tolerance):
    """The box is the tightest around the mask, and the mask is where the image is bright."""
    mask = outputs["segmentation"][..., 0] == 2
    assert (outputs["box_label"] >= 0).sum() <= 1
    bright = outputs["image"][..., 0] > 187
    dark = outputs["image"][..., 0] < 63
    assert not (mask & dark).any()
    assert not (~mask & bright).any()
    if outputs["box_label"][0] < 0:
        return
    rows, columns = np.nonzero(mask)
    height, width = np.array(mask.shape) * outputs.get("content", np.ones(2))
    y0, x0, y1, x1 = outputs["boxes"][0] * np.tile((height, width), 2)
    tight = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
    np.testing.assert_allclose([y0, x0, y1, x1], tight, atol=tolerance)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_cropping_and_flipping_keep_what_belongs_together(seed):
    outputs = run("joint_flip_lr|joint_crop((20, 40))", seed=seed)
    assert outputs["image"].shape == (20, 40, 3)
    agree(outputs, 1e-3)
    assert (outputs["segmentation"][:, 32:] == 255).all()  # The image is 32 wide: padding.
    assert (outputs["image"][:, 32:] == 128).all()


def test_a_window_may_lie_at_either_end():
    fields = {"image": tf.constant(np.arange(15, dtype=np.uint8).reshape(5, 3, 1))}
    tops = {int(run("joint_crop((4, 3))", fields, seed)["image"][0, 0, 0]) for seed in range(20)}
    assert tops == {0, 3}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_scaling_keeps_what_belongs_together(seed):
    outputs = run("joint_scale(0.7, 1.6)|joint_flip_lr", seed=seed)
    height, width = outputs["image"].shape[:2]
    assert round(0.7 * SIDE) <= height <= round(1.6 * SIDE)
    assert abs(width / height - (SIDE + 8) / SIDE) < 0.1
    agree(outputs, 1.0)


def test_scaling_may_start_from_a_shorter_side():
    """In a single interpolation, which equals that of the size drawn."""
    outputs = run("joint_scale(1.5, 1.5, shorter=20)")
    assert outputs["image"].shape == (30, 40, 3)
    np.testing.assert_array_equal(outputs["image"], run("joint_resize((30, 40))")["image"])


@pytest.mark.parametrize("text", ["joint_resize((48, 80))", "joint_resize_small(48)"])
def test_resizing(text):
    outputs = run(text)
    np.testing.assert_array_equal(outputs["boxes"], record()["boxes"])
    agree(outputs, 1.0)


def test_fitting_pads_and_says_how_much_is_image():
    outputs = run("joint_fit((40, 16), fill=9)")
    assert outputs["image"].shape == (40, 16, 3)
    np.testing.assert_allclose(outputs["content"], [12 / 40, 1.0])
    assert (outputs["image"][12:] == 9).all()
    assert (outputs["segmentation"][12:] == 255).all()
    np.testing.assert_array_equal(outputs["boxes"], record()["boxes"])
    agree(outputs, 1.0)
    with pytest.raises(UserError, match="put joint_fit behind this op"):
        run("joint_fit(16)|joint_crop(8)")


def test_both_sides_of_a_flip_occur():
    flipped = [run("joint_flip_lr", seed=seed)["boxes"][0, 1] for seed in range(12)]
    np.testing.assert_allclose(np.unique(np.round(flipped, 4)), [3 / 32, 1 - 19 / 32], atol=1e-4)


def test_objects_that_are_hardly_seen_are_left_out():
    fields = record((0, 0, 4, 32))  # A stripe at the top.
    kept = [
        run("joint_crop((10, 32), min_visible=0.6)", fields, s)["box_label"][0] for s in range(20)
    ]
    visible = [
        (run("joint_crop((10, 32))", fields, s)["segmentation"] == 2).sum() / 128 for s in range(20)
    ]
    assert [label >= 0 for label in kept] == [share >= 0.6 for share in visible]
    assert {-1, 2} == set(kept)


def test_labels_are_shifted_and_mapped():
    mask = tf.constant(np.array([0, 1, 2, 3, 255], np.uint8).reshape(1, 5, 1))
    shifted = run("shift_labels(-1)", {"segmentation": mask})["segmentation"]
    assert shifted.ravel().tolist() == [255, 0, 1, 2, 255]
    mapped = run("map_labels(7, 255, 5)", {"segmentation": mask})["segmentation"]
    assert mapped.ravel().tolist() == [7, 255, 5, 255, 255]


def test_labels_out_of_range_and_masks_of_another_size_fail():
    def fails(text, fields, match):
        graph = tf.function(lambda seed: pp.build(text)(fields, seed), autograph=False)
        with pytest.raises(tf.errors.InvalidArgumentError, match=match):
            graph(tf.zeros([2], tf.int32))

    fails("check_segmentation(2)", record(), r"label\] \[2\] \[but only 2 classes")
    assert run("check_segmentation(3)")
    other = record() | {"segmentation": tf.zeros([4, 4, 1], tf.uint8)}
    fails("joint_decode", other, r"segmentation is\] \[4 4\].*but the image\] \[24 32\]")
    with pytest.raises(UserError, match="no field 'segmentation'; copy"):
        run("check_segmentation(2)", {"image": record()["image"]})


def test_boxes_of_a_padded_image_need_its_content():
    for text in (
        "joint_fit(16)|keep('image', 'boxes', 'box_label')",
        "joint_fit(16)|drop('content')",
    ):
        with pytest.raises(UserError, match=r"write keep\(.*'boxes'.*, 'content'\)"):
            run(text)
    assert "content" in run("joint_fit(16)|keep('image', 'boxes', 'content')")
    assert "content" not in run("joint_fit(16)|keep('image', 'segmentation')")


def test_windows_that_one_class_fills_are_drawn_again():
    """mmsegmentation's `cat_max_ratio`: 10 further windows, then the last one."""
    mask = np.zeros((24, 96, 1), np.uint8)
    mask[:, 48:] = 1
    mask[:, 90:] = 255
    fields = {"image": tf.zeros((24, 96, 3), tf.uint8), "segmentation": tf.constant(mask)}
    plain, mixed = pp.build("joint_crop(24)"), pp.build("joint_crop(24, max_class_share=0.75)")
    seeds = tf.data.Dataset.range(60).map(lambda n: tf.stack([tf.cast(n, tf.int32), 3]))

    def shares(crop):
        windows = seeds.map(lambda seed: crop(fields, seed)["segmentation"])
        counts = [np.bincount(x.ravel(), minlength=2)[:2] for x in windows.as_numpy_iterator()]
        return np.array([c.max() / max(c.sum(), 1) for c in counts])

    assert (shares(plain) < 0.75).mean() < 0.4
    assert (shares(mixed) < 0.75).mean() > 0.8
