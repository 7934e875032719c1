"""Digit scenes: what the annotations say is what the pixels show, and no test pixel is trained on.

`prepare` and the sources are tried on a few scenes.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.data import boxes as boxes_lib
from vit_jax.data import eval_batches, open_source
from vit_jax.data.builders import _scenes as scenes
from vit_jax.data.builders._scenes import draw_scene
from vit_jax.errors import UserError
from vit_jax.report.contact_sheet import contact_sheet

PP = "joint_decode|check_segmentation(11)"


def open_scenes(scenes_dir, split="test", name="32px", **args):
    spec = {"source": "tfds", "name": f"digit_scenes/{name}", "dir": scenes_dir, "split": split}
    return open_source(spec | args)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from([32, 48, 70]))
def test_boxes_and_areas_are_those_of_the_masks(seed, index, side):
    scene = draw_scene(seed, index, split="test", side=side)
    assert scene.image.shape == (side, side, 3)
    assert 1 <= len(scene.digits) <= scenes.MAX_DIGITS
    mask = scene.segmentation[..., 0]
    claimed = np.zeros_like(mask)
    for box, digit, area in zip(scene.boxes, scene.digits, scene.areas, strict=True):
        y0, x0, y1, x1 = np.round(box * side).astype(int)
        inside = mask[y0:y1, x0:x1] == digit + 1
        # Tight: ink on every border; nothing of the digit is outside.
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        assert inside.sum() == area
        claimed[y0:y1, x0:x1] = 1
    assert not mask[claimed == 0].any()


def test_a_scene_depends_on_seed_and_index_alone():
    first = draw_scene(3, 7, split="train", side=32)
    draw_scene(1, 1, split="test", side=48)
    again = draw_scene(3, 7, split="train", side=32)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (draw_scene(4, 7, split="train", side=32).image != first.image).any()
    assert (draw_scene(3, 8, split="train", side=32).image != first.image).any()


def test_training_and_test_scenes_share_neither_writers_nor_regions():
    for train, test in zip(scenes._photographs("train"), scenes._photographs("test"), strict=True):
        assert train.shape[1] + test.shape[1] == 640
        assert test.shape[1] == 160
    from sklearn.datasets import load_digits

    digits = load_digits().images
    np.testing.assert_array_equal(scenes._digits("train")[0] * 16, digits[:1437])
    np.testing.assert_array_equal(scenes._digits("test")[0] * 16, digits[1437:])


@pytest.mark.parametrize(
    ("digits", "boxes", "caption"),
    [
        ([3], [[0, 0, 0.5, 0.5]], "a 3"),
        ([7, 3], [[0.5, 0, 0.9, 0.5], [0, 0, 0.4, 0.4]], "a 3 above a 7"),
        ([7, 3], [[0, 0.5, 0.5, 0.9], [0, 0, 0.4, 0.4]], "a 3 left of a 7"),
        (
            [1, 2, 3],
            [[0.6, 0, 1, 1], [0, 0, 0.2, 1], [0.3, 0, 0.5, 1]],
            "a 2, a 3 and a 1 from top to bottom",
        ),
    ],
)
def test_captions(digits, boxes, caption):
    assert scenes._caption(np.array(digits), np.array(boxes, float)) == caption


def test_prepared_scenes_come_back_as_they_were_drawn(scenes_dir):
    source = open_scenes(scenes_dir, max_objects=6)
    assert (source.num_classes, source.class_names) == (10, tuple("0123456789"))
    (batch,) = eval_batches(source, batch_size=4, rows=np.arange(4), pp=PP)
    for row in range(4):
        scene = draw_scene(1, row, split="test", side=32)
        count = len(scene.digits)
        np.testing.assert_array_equal(batch["image"][row], scene.image)
        np.testing.assert_array_equal(batch["segmentation"][row], scene.segmentation)
        np.testing.assert_allclose(batch["boxes"][row, :count], scene.boxes, atol=1e-6)
        np.testing.assert_array_equal(batch["box_label"][row, :count], scene.digits)
        assert (batch["box_label"][row, count:] == -1).all()
        np.testing.assert_array_equal(batch["box_area"][row, :count], scene.areas)
    np.testing.assert_array_equal(batch["image_size"], 32)


def test_single_digits_are_as_large_as_those_of_scenes(scenes_dir):
    singles = open_scenes(scenes_dir, name="16px_single")
    assert singles.class_names == scenes.CLASS_NAMES[1:]
    for row, label in enumerate(singles.fetch(np.arange(4))["label"]):
        scene = draw_scene(1, row, split="test", side=16, max_digits=1, digit_share=(0.5, 1.0))
        assert scene.digits.tolist() == [label]
        assert 4 <= 16 * (scene.boxes[0, 2] - scene.boxes[0, 0]) < 16


def test_which_classes_count_can_be_chosen(scenes_dir):
    segmented = open_scenes(scenes_dir, classes_of="segmentation")
    assert segmented.class_names == scenes.CLASS_NAMES
    with pytest.raises(UserError, match="no classes of 'segmentatoin'; did you mean"):
        open_scenes(scenes_dir, classes_of="segmentatoin")


def test_too_many_objects_name_the_record(scenes_dir):
    counts = [len(draw_scene(0, i, split="train", side=32).digits) for i in range(3)]
    crowded = int(np.argmax(counts))
    assert counts[crowded] > 1
    with pytest.raises(UserError, match=r"record \d of TFDS digit_scenes.*max_objects=1;"):
        open_scenes(scenes_dir, "train", max_objects=1)


def test_the_contact_sheet_shows_masks_and_boxes(scenes_dir, tmp_path):
    def colours(pp):
        batches = eval_batches(
            open_scenes(scenes_dir), batch_size=4, rows=np.arange(4), pp=f"{PP}|{pp}"
        )
        contact_sheet(batches, tuple("0123456789"), tmp_path / "sheet.png", num_images=4)
        from PIL import Image

        return {tuple(c) for c in np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3)}

    from vit_jax.report.drawing import class_color

    digits = {int(d) for i in range(4) for d in draw_scene(1, i, split="test", side=32).digits}
    assert {class_color(d) for d in digits} <= colours("keep('image', 'boxes', 'box_label')")
    assert colours("keep('image', 'segmentation')") != colours("keep('image')")


@pytest.mark.parametrize(
    "box",
    [
        (0.5, 0.1, 0.5, 0.9),
        (0.6, 0.1, 0.5, 0.9),
        (0.1, 0.1, 0.5, 1.2),
        (0.1, float("nan"), 0.5, 0.9),
    ],
    ids=["degenerate", "inverted", "outside", "nan"],
)
def test_bad_boxes_name_the_record_or_are_left_out(box):
    good = (0.1, 0.2, 0.3, 0.4)
    objects = boxes_lib.Objects([good, box], [4, 5], [False, True], [1.0, 2.0])
    with pytest.raises(UserError, match="photo 3: object 1 has the box"):
        boxes_lib.check(objects, on_bad_box="fail", describe=lambda: "photo 3")
    left = boxes_lib.check(objects, on_bad_box="drop", describe=lambda: "photo 3")
    np.testing.assert_allclose(left.boxes, [good])
    assert left.label.tolist() == [4]


def test_boxes_past_the_border_by_rounding_are_cut():
    objects = boxes_lib.Objects([(-0.0005, 0.1, 0.5, 1.0004)], [0], [False], [0.0])
    cut = boxes_lib.check(objects, on_bad_box="fail", describe=str).boxes
    np.testing.assert_allclose(cut, [[0, 0.1, 0.5, 1]])
