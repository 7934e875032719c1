"""Figures: what they show, read off the artists; that they render at all."""

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from vit_jax.report import figures


def rendered(figure):
    """The figure's pixels, `[height, width, 3]`."""
    return np.asarray(Image.open(io.BytesIO(figures.png(figure))).convert("RGB"))


def texts(figure):
    import matplotlib.text

    found = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    return [text for text in found if text]


def pictures(figure):
    return [image.get_array() for axes in figure.axes for image in axes.images]


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


def test_attention_panel_has_a_row_for_each_kind(rng):
    images = list(rng.integers(0, 255, (3, 6, 9, 3), np.uint8))
    overlays = {"last layer": images, "rollout": images}
    figure = figures.attention_panel(images, overlays, ["a", "b", "c"])
    assert len(figure.axes) == 9
    assert {"image", "last layer", "rollout", "a", "b", "c"} <= set(texts(figure))
    rendered(figure)


def cells_of(figure, axes_index, grid, size):
    """The maps of a mosaic, `[rows, columns, h, w]`, cut at the gaps."""
    axes = figure.axes[axes_index]
    mosaic = np.ma.filled(axes.images[0].get_array(), np.nan)
    is_gap = np.isnan(mosaic)
    rows = np.split(mosaic, np.flatnonzero(is_gap.all(axis=1)))
    maps = []
    for row in rows:
        columns = np.split(row, np.flatnonzero(is_gap.all(axis=0)), axis=1)
        maps += [m[~np.isnan(m)] for m in columns if (~np.isnan(m)).any()]
    assert (len(axes.get_yticks()), len(axes.get_xticks())) == grid
    repeats = round((maps[0].size / np.prod(size)) ** 0.5)
    whole = [m.reshape(size[0] * repeats, size[1] * repeats) for m in maps]
    return np.stack([m[::repeats, ::repeats] for m in whole]).reshape(*grid, *size)


def test_attention_heads_scales_each_map_to_its_own_largest(rng):
    heads = rng.random((3, 2, 2, 4)) * np.array([1.0, 1e-3])[:, None, None]
    figure = figures.attention_heads(np.zeros((4, 8), np.uint8), heads, {}, title="cat.jpg")
    shown = cells_of(figure, 1, (3, 2), (2, 4))
    np.testing.assert_allclose(shown, heads / heads.max(axis=(2, 3), keepdims=True), rtol=1e-6)
    assert {"cat.jpg", "layer", "head", "image"} <= set(texts(figure))
    rendered(figure)


def test_position_similarity_is_the_cosine(rng):
    pos_embed = rng.normal(size=(2, 3, 16))
    figure = figures.position_similarity(pos_embed)
    flat = pos_embed.reshape(6, 16)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    expected = (unit @ unit.T).reshape(2, 3, 2, 3)
    np.testing.assert_allclose(cells_of(figure, 0, (2, 3), (2, 3)), expected, atol=1e-6)
    rendered(figure)


def test_position_similarity_thins_large_grids(rng):
    figure = figures.position_similarity(rng.normal(size=(24, 30, 8)), max_side=6)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(figure.axes[0].get_yticks()) == 6
    assert (len(labels), labels[0], labels[-1]) == (6, "1", "30")


def test_patch_filters_are_the_principal_components(rng):
    # Two orthogonal patterns with different spread, and nothing else.
    one, two = np.zeros((4, 4, 1)), np.zeros((4, 4, 1))
    one[0], two[2, :2], two[2, 2:] = 1.0, 1.0, -1.0
    weights = rng.normal(size=(2, 50))
    weights -= weights.mean(axis=1, keepdims=True)
    weights[1] -= weights[0] * (weights[1] @ weights[0]) / (weights[0] @ weights[0])
    kernel = 3 * one[..., None] * weights[0] + two[..., None] * weights[1]
    figure = figures.patch_filters(kernel, count=2)
    first, second = (np.asarray(picture)[..., 0] / 255 for picture in pictures(figure))
    np.testing.assert_allclose(first, 0.5 + 0.5 * one[..., 0], atol=0.01)
    largest = np.abs(second - 0.5)
    np.testing.assert_allclose(largest, 0.5 * np.abs(two[..., 0]), atol=0.01)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_patch_filters_of_any_channels_draw(rng, channels):
    figure = figures.patch_filters(rng.normal(size=(2, 3, channels, 5)))
    assert len(figure.axes) == 5
    rendered(figure)


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
    figure = figures.learning_curves(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss", "Accuracy"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    rendered(figure)
    assert figures.learning_curves([{"step": 1, "model/num_params": 3}]) is None


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
