"""The contact sheet is a PNG in which the images can be found again."""

import numpy as np
import pytest
from drawn import ODD_NAMES
from PIL import Image

from vit_jax.data.tokenizer import BYTES, open_tokenizer
from vit_jax.report.contact_sheet import _caption, contact_sheet
from vit_jax.report.drawing import class_color, with_names


def colours(image):
    return {tuple(colour) for colour in np.asarray(image).reshape(-1, 3)}


def test_tiny_images_are_magnified_without_blur(tmp_path):
    pixels = np.zeros((3, 4, 4, 1), np.uint8)
    pixels[:, :2] = 200
    batch = {"image": pixels, "label": np.array([2, 0, 1])}
    path = tmp_path / "sheet.png"
    assert contact_sheet([batch], ["a", "b", "c"], path, columns=2) == 3
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == (2 * 120 + 8, 2 * (112 + 13 + 16) + 8)
        assert colours(sheet.crop((8, 8, 120, 64))) == {(200, 200, 200)}
        assert colours(sheet.crop((8, 64, 120, 120))) == {(0, 0, 0)}


def test_a_title_and_the_originals_are_drawn_when_they_are_given(tmp_path):
    batch = {"image": np.full((2, 112, 112, 3), 9, np.uint8)}
    originals = [{"image": np.full((2, 56, 84, 3), 77, np.uint8)}]  # Half as high.
    path = tmp_path / "sheet.png"
    contact_sheet([batch], None, path, title="c.py · from step 3", originals=originals)
    with Image.open(path) as sheet:
        assert sheet.size == (2 * (168 + 112 + 8) + 8, (112 + 13 + 16) + 8 + 13 + 16)
        assert len(colours(sheet.crop((0, 0, 500, 30)))) > 1
        assert colours(sheet.crop((8, 37, 8 + 168, 37 + 112))) == {(77, 77, 77)}
        assert colours(sheet.crop((8 + 168, 37, 8 + 280, 37 + 112))) == {(9, 9, 9)}


def test_texts_are_the_captions_of_images_that_have_them(tmp_path):
    tokenizer = open_tokenizer(BYTES, 8)
    batch = {"image": np.zeros((2, 8, 8, 3), np.uint8), "tokens": tokenizer.encode(["a 3", ""])}
    path = tmp_path / "sheet.png"
    contact_sheet([batch], None, path, tokenizer=tokenizer)
    with Image.open(path) as sheet:
        drawn = [colours(sheet.crop((8 + 120 * i, 122, 120 + 120 * i, 140))) for i in range(2)]
    assert len(drawn[0]) > 1
    assert len(drawn[1]) == 1


def test_takes_no_more_than_it_needs_and_leaves_padding_out(tmp_path):
    def batches():
        image = np.full((4, 150, 120, 3), 7, np.uint8)
        yield {"image": image, "mask": np.array([1.0, 0.0, 1.0, 1.0])}
        yield {"image": image}
        raise AssertionError("asked for a third batch")

    assert contact_sheet(batches(), None, tmp_path / "s.png", num_images=5) == 5


def test_float_images_and_label_vectors(tmp_path):
    image = np.linspace(-1, 1, 2 * 6 * 6 * 3, dtype=np.float32).reshape(2, 6, 6, 3)
    label = np.array([[0, 1, 1], [0.9, 0.05, 0.05]], np.float32)
    path = tmp_path / "sheet.png"
    assert contact_sheet([{"image": image, "label": label}], ["a", "b", "c" * 40], path) == 2
    with Image.open(path) as sheet:
        assert len(colours(sheet)) > 50


def test_crops_are_drawn_side_by_side(tmp_path):
    crops = {"global": np.full((2, 2, 8, 8, 3), 200), "local": np.full((2, 3, 4, 4, 3), 90)}
    path = tmp_path / "sheet.png"
    assert contact_sheet([{k: x.astype(np.uint8) for k, x in crops.items()}], None, path) == 2
    with Image.open(path) as sheet:
        assert colours(sheet.crop((8, 8, 72, 40))) == {(200, 200, 200)}
        assert colours(sheet.crop((72, 8, 120, 24))) == {(90, 90, 90)}


@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 6, 8, 1)])
def test_a_class_for_each_pixel_is_drawn_and_no_caption(tmp_path, shape):
    """The segmentation task passes its label map as `label`."""
    label = np.full(shape, 255, np.int32)
    label[0, :, :4] = 1
    image = np.zeros((2, 6, 8, 3), np.uint8)
    path = tmp_path / "sheet.png"
    assert contact_sheet([{"image": image, "label": label}], ["none", "road"], path) == 2
    tint = tuple(np.round(0.55 * np.array(class_color(1))).astype(int).tolist())
    with Image.open(path) as sheet:
        assert tint in colours(sheet)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_users_fit_below_and_on_images(tmp_path, name):
    batch = {
        "image": np.zeros((1, 8, 8, 3), np.uint8),
        "label": np.array([0]),
        "boxes": np.array([[[0, 0, 0.5, 0.5]]]),
        "box_label": np.array([[0]]),
    }
    assert contact_sheet([batch], [name], tmp_path / "sheet.png") == 1
    picture = with_names(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), int), ["", name])
    assert picture.shape == (192, 192, 3)


def test_labels_without_a_name_are_numbers():
    assert _caption(np.array([7]), 0, ["a", "b"]) == "7"
    assert _caption(np.array([-1]), 0, ["a", "b"]) == "-1"


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        contact_sheet([], None, tmp_path / "s.png")


@pytest.mark.parametrize(
    ("label", "caption"),
    [
        (np.array([2]), "c"),
        (np.array([[0.02, 0.3, 0.68]]), "c 68%, b 30%"),
        (np.array([[0.05, 0.9, 0.05]]), "b"),
        (np.array([[1.0, 0.0, 1.0]]), "a, c"),
        (None, ""),
    ],
)
def test_captions_name_what_an_image_counts_as(label, caption):
    assert _caption(label, 0, ["a", "b", "c"]) == caption
