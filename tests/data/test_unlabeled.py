"""The part of a preprocessing string that files without labels go through, and its geometry."""

import numpy as np
import pytest

from vit_jax.data.placement import NOT_SEEN, Placement
from vit_jax.data.unlabeled import ImagePart, image_part, placement
from vit_jax.errors import UserError

SEED = np.array([3, 5], np.int32)


@pytest.mark.parametrize(
    ("pp", "text", "is_sized"),
    [
        ("", "", False),
        ("resize(16)", "decode(1)|resize(16)", True),
        ("decode|resize_small(9)", "decode|resize_small(9)", False),
        (
            "decode|resize(8)|onehot(3, key='label')|keep('image', 'label')",
            "decode|resize(8)|keep('image')",
            True,
        ),
        (
            "copy('mask', 'segmentation')|joint_decode|shift_labels(-1)|check_segmentation(4)"
            "|map_labels(0, 1)|joint_fit(8)|drop('mask')",
            "joint_decode|joint_fit(8)|drop()",
            True,
        ),
        ("decode|resize(8)|lower|choose|tokenize(4)", "decode|resize(8)", True),
        ("decode(inkey='image', outkey='x')|copy('x', 'image')|resize(4)", None, True),
        ("decode|resize(8)|flip_lr(key='other')|value_range(-1, 1)", None, True),
    ],
)
def test_ops_that_need_labels_are_left_out(pp, text, is_sized):
    found = image_part(pp, 1)
    assert found.is_sized == is_sized
    if text is not None:
        assert found.text == text
    assert "flip_lr" not in found.text


@pytest.mark.parametrize("pp", ["decode|rezise(8)", "decode|resize('a')"])
def test_mistakes_stay_mistakes(pp):
    with pytest.raises(UserError):
        image_part(pp, 3)


@pytest.mark.parametrize(
    ("pp", "scale", "origin"),
    [
        ("decode|resize(16)", (2.5, 5.0), (0, 0)),
        ("decode|resize(80, 'nearest')", (0.5, 1.0), (0, 0)),
        ("decode|resize((8, 16), 'bicubic', antialias=True)|value_range(-1, 1)", (5, 5), (0, 0)),
        ("decode|resize_small(20)|central_crop(16)", (2, 2), (4, 24)),
        ("decode|central_crop", (1, 1), (0, 20)),
        ("joint_decode|joint_fit(16)", (5, 5), (0, 0)),
        ("joint_decode|joint_fit((8, 64))", (5, 5), (0, 0)),
        (
            "joint_decode|joint_resize_small(20)|joint_fit(20)|keep('image', 'boxes')",
            (4, 4),
            (0, 0),
        ),
    ],
)
def test_placements_undo_the_geometry(pp, scale, origin):
    found = placement(image_part(pp, 3), (40, 80), SEED)
    np.testing.assert_allclose(found.scale, scale, rtol=2e-3)
    np.testing.assert_allclose(found.origin, origin, atol=0.1)
    assert found.size == (40, 80)


def test_random_geometry_is_that_of_the_seed():
    part = image_part("decode|random_crop((20, 30))|flip_lr", 3)
    found = {placement(part, (40, 80), np.array([0, i], np.int32)) for i in range(8)}
    assert len(found) > 4
    assert {round(place.scale[1], 3) for place in found} == {1.0, -1.0}
    for place in found:
        assert place.scale[0] == pytest.approx(1)
        assert 0 <= round(place.origin[0]) <= 20


@pytest.mark.parametrize(
    "pp",
    [
        "decode|random_affine(rotate=45)|resize(32)",
        "decode|resize(32)|randaug(2, 10)",  # It takes bytes alone.
    ],
)
def test_what_is_no_scaled_part_of_the_file_has_no_placement(pp):
    assert placement(image_part(pp, 3), (40, 80), SEED) is None


def test_an_op_that_changes_values_is_not_taken_for_geometry():
    assert placement(ImagePart("decode|resize(8)", True), (2, 2), SEED).size == (2, 2)
    assert placement(ImagePart("decode|resize(8)", True), (1, 9), SEED) is None


def test_boxes_and_labels_of_a_mirrored_part():
    place = Placement((2.0, -4.0), (6.0, 44.0), (20, 50))
    (box,) = place.boxes(np.array([[0.0, 0.0, 0.5, 0.5]]), np.array([4, 10]))
    np.testing.assert_allclose(box, [6 / 20, 24 / 50, 10 / 20, 44 / 50])
    labels = np.arange(40, dtype=np.uint8).reshape(4, 10)
    found = place.labels(labels)
    assert found.shape == (20, 50)
    assert found[6, 43] == 0
    assert found[13, 4] == 39
    assert (found[:6] == NOT_SEEN).all()
    assert (found[:, 44:] == NOT_SEEN).all()
    assert (found[6:14, 4:44] == labels[:, ::-1].repeat(2, 0).repeat(4, 1)).all()


def test_one_preparation_after_another():
    first = Placement((2.0, 3.0), (10.0, 20.0), (100, 200))
    second = Placement((0.5, 0.25), (1.0, 2.0), (40, 50))
    assert second.after(first) == Placement((1.0, 0.75), (12.0, 26.0), (100, 200))
