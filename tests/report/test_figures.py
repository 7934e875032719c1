"""Figures: what they show, read off the artists; that they render at all."""

import subprocess
import sys

import numpy as np
import pytest
from drawn import pictures, rendered, texts
from matplotlib.colors import to_hex

from vit_jax.report import figures


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_confusion_matrix_shows_counts_names_and_recall():
    matrix = np.array([[8, 2, 0], [0, 10, 0], [0, 0, 0]])
    figure = figures.confusion_matrix(matrix, ["cat", "dog", "emu"])
    shown = texts(figure)
    assert {"8", "2", "10", "80%", "100%", "cat", "dog", "emu", "true", "predicted"} <= set(shown)
    (cells,) = pictures(figure)
    assert to_hex(cells[1, 1, :3]) == "#2463eb"  # all right: the full blue
    assert to_hex(cells[0, 1, :3]) == "#d9480f"  # the worst mistake: the full orange
    assert cells[0, 2, 3] == 0
    rendered(figure)


def test_confusion_matrix_of_many_classes_writes_no_numbers(rng):
    figure = figures.confusion_matrix(rng.integers(0, 50, (100, 100)))
    assert not {str(n) for n in range(21, 50)} & (set(texts(figure)) - {"40"})
    rendered(figure)


def test_image_grid_places_every_image_and_caption(rng):
    images = rng.integers(0, 255, (11, 8, 8, 3), np.uint8)
    captions = [f"image {i}" for i in range(11)]
    figure = figures.image_grid(images, captions, notes=["note"] * 11)
    assert len(figure.axes) == 11
    assert set(captions) < set(texts(figure))
    for shown, image in zip(pictures(figure), images, strict=True):
        np.testing.assert_array_equal(shown, image)
    rendered(figure)


def test_long_captions_get_wider_columns(rng):
    images = rng.integers(0, 255, (8, 4, 4, 1), np.uint8)

    def columns(captions):
        grid = figures.image_grid(images, captions)
        return grid.axes[0].get_subplotspec().get_gridspec().ncols

    assert columns(["7"] * 8) == 8
    assert columns(["a very long caption of one image"] * 8) < 5


def test_small_images_stay_crisp():
    image = np.zeros((8, 8), np.uint8)
    image[::2, ::2] = 255
    pixels = rendered(figures.image_grid([image]))
    gray = np.isin(pixels, (0, 255)).mean()
    assert gray > 0.97  # hardly any pixel between black and white


def test_hardest_mistakes_are_wrong_and_sorted_by_the_truth_s_probability():
    labels = np.array([0, 1, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.99, 0.01]])
    images = np.arange(4 * 4, dtype=np.uint8).reshape(4, 2, 2)
    figure = figures.hardest_mistakes(images, labels, probabilities, ["cat", "dog"])
    shown = [text for text in texts(figure) if text.startswith(("said", "is"))]
    assert shown == [
        "said cat  99%",
        "is dog  1.0%",
        "said cat  80%",
        "is dog  20.0%",
        "said dog  60%",
        "is cat  40.0%",
    ]
    assert [int(picture[0, 0, 0]) for picture in pictures(figure)] == [12, 4, 8]
    right = np.eye(2)[labels]
    assert figures.hardest_mistakes(images, labels, right) is None


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.array([[0, 255]], np.uint8), [[0, 255]]),
        (np.array([[0.0, 1.0]]), [[0, 255]]),
        (np.array([[-1.0, 1.0]]), [[0, 255]]),
        (np.array([[0.0, 16.0]]), [[0, 255]]),
        (np.array([[3.0, 3.0]]), [[0, 0]]),
    ],
)
def test_images_of_any_range_become_displayable(image, expected):
    shown = figures.displayable(image)
    assert shown.dtype == np.uint8
    assert shown.shape == (1, 2, 3)
    np.testing.assert_array_equal(shown[..., 0], expected)


def test_learning_curves_draw_the_main_charts():
    rows = [{"step": s, "train/loss": 1.0 / s, "train/grad_norm": 1.0} for s in range(1, 5)]
    rows[-1]["eval/test/accuracy"] = 0.5
    figure = figures.learning_curves(rows, {})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss", "Accuracy"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    rendered(figure)
    assert figures.learning_curves([{"step": 1, "model/num_params": 3}], {}) is None


def test_a_figure_for_a_dark_page_differs_only_in_its_inks():
    figure = figures.confusion_matrix(np.eye(3, dtype=int))
    light = rendered(figure)
    with figures.recolored(figure):
        dark = rendered(figure)
    assert light[0, 0].tolist() == [255, 255, 255]
    assert dark[0, 0].tolist() == [0x14, 0x18, 0x1E]
    np.testing.assert_array_equal(light, rendered(figure))


def test_nothing_global_is_touched():
    """In a process of its own: other tests, and libraries they load, may have imported pyplot."""
    code = (
        "import sys, numpy as np\n"
        "from vit_jax.report import figures\n"
        "figures.confusion_matrix(np.eye(2, dtype=int))\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
