"""Boxes and segmentations stand where they should, in colours that can be told apart and read."""

import numpy as np
import pytest

from vit_jax.report import drawing

BLACK = np.zeros((64, 96, 3), np.uint8)


def test_a_box_is_an_outline_of_its_colour_at_its_place():
    picture = drawing.with_boxes(BLACK, np.array([[0.25, 0.5, 0.75, 1.0]]), [3], [""])
    assert picture.shape == (128, 192, 3)  # Enlarged, so that its longer side is 192.
    rows, columns = np.nonzero((picture == drawing.class_color(3)).all(-1))
    assert (rows.min(), rows.max()) == (32, 95)
    assert (columns.min(), columns.max()) == (96, 191)
    assert not picture[40:88, 104:184].any()


def test_texts_stay_inside_and_contrast_with_what_is_behind_them():
    """By the contrast that WCAG 2 asks of small texts, 4.5, over all colors of classes."""

    def luminance(colour):
        values = np.array(colour) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    for number in range(100):
        colour = drawing.class_color(number)
        picture = drawing.with_boxes(BLACK, np.array([[0, 0, 0.01, 0.01]]), [number], ["7 99 %"])
        pixels = picture[2:14, 2:30].reshape(-1, 3).astype(int)
        ink = pixels[np.abs(pixels - colour).sum(1).argmax()]
        lighter, darker = sorted((luminance(colour), luminance(ink)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, number


def test_classes_that_are_neighbours_differ():
    colours = np.array([drawing.class_color(number) for number in range(20)], int)
    assert np.abs(np.diff(colours, axis=0)).sum(1).min() > 100


@pytest.mark.parametrize("background", [0, None])
def test_segmentations_tint_and_what_is_ignored_turns_grey(background):
    segmentation = np.array([[0, 1], [drawing.IGNORED, 1]])
    picture = drawing.with_segmentation(BLACK[:2, :2], segmentation, background=background)
    tint = np.array(drawing.class_color(1)) * 0.55
    np.testing.assert_allclose(picture[:, 1], np.stack([tint, tint]), atol=1)
    assert len(set(picture[1, 0].tolist())) == 1
    assert picture[1, 0, 0] > 0
    assert picture[0, 0].any() == (background is None)


def test_float_images_are_stretched_and_grey_ones_get_three_channels():
    picture = drawing.rgb(np.array([[[-1.0], [1.0]]]))
    assert picture.tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_a_class_is_named_where_it_is():
    """Class 1 is a ring: its middle lies outside of it, its name does not."""
    segmentation = np.zeros((32, 32), int)
    segmentation[4:28, 4:28] = 1
    segmentation[8:24, 8:24] = 2
    segmentation[0, 0] = 3  # Too little.
    picture = drawing.with_names(BLACK[:32, :32], segmentation, ["none", "ring", "disc", "dot"])
    assert picture.shape == (192, 192, 3)
    for number, low, high in ((1, 4, 28), (2, 8, 24)):
        rows, columns = np.nonzero((picture == drawing.class_color(number)).all(-1))
        assert low <= rows.min() / 6 < rows.max() / 6 <= high
        assert low <= columns.min() / 6 < high
    for number in (0, 3):
        assert not (picture == drawing.class_color(number)).all(-1).any()
    with_ignored = np.full((32, 32), drawing.IGNORED)
    assert not drawing.with_names(BLACK[:32, :32], with_ignored, ["none"]).any()
