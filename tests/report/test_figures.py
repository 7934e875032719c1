"""Figures: what they show, read off the artists; that they render at all."""

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from drawn import ODD_NAMES, names, pictures, rendered, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from vit_jax.report import curves, figures, inside


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


def test_reliability_diagram_has_a_bar_for_each_bin_with_images():
    count, accuracy = np.array([0, 3.0, 0, 7]), np.array([np.nan, 0.25, np.nan, 0.75])
    figure = figures.reliability_diagram(count, accuracy)
    bars = [
        [(bar.get_center()[0], bar.get_height()) for bar in axes.patches] for axes in figure.axes
    ]
    expected = [[(0.375, 0.25), (0.875, 0.75)], [(0.375, 3), (0.875, 7)]]
    np.testing.assert_allclose(bars, expected)
    assert {"confidence", "accuracy", "images"} <= set(texts(figure))
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
    shown = [text for text in texts(figure) if "%" in text]
    assert shown == [
        "cat 99%",
        "true: dog 1.0%",
        "cat 80%",
        "true: dog 20.0%",
        "dog 60%",
        "true: cat 40.0%",
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


def test_no_chart_replaces_another_one():
    names = ["eval/val/accuracy", "eval/val/learning_rate", "eval/val/top_1", "eval/val/Top_1"]
    names += ["train/accuracy", "train/lr", "train/a/loss", "device/x", "hosts/x", "train/y/x"]
    found = curves.charts([{"step": 1, **dict.fromkeys(names, 0.5)}], {})
    assert sum(len(chart.series) for chart in found) == len(names)
    titles = [chart.title for chart in found]
    assert len(set(titles)) == len(titles)
    assert {"Accuracy", "Train accuracy", "Learning rate", "Train lr", "Hosts x"} <= set(titles)


def test_charts_with_few_decades_have_a_logarithmic_scale_and_plain_labels():
    points = [(step, 10.0 ** (2 - step)) for step in range(5)]
    figure = figures.learning_curve(curves.Chart("Loss", (curves.Series("test loss", points),)))
    rendered(figure)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert {"0.01", "0.1", "1", "10", "100"} <= set(labels)


@settings(max_examples=50)
@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_text_on_a_cell_of_any_color_has_the_contrast_of_wcag(color):
    def luminance(color):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    ink = figures.legible_ink(np.array(color))
    both = sorted([luminance(color), luminance([int(ink[i : i + 2], 16) / 255 for i in (1, 3, 5)])])
    assert (both[1] + 0.05) / (both[0] + 0.05) >= 4.5


def test_a_noisy_training_loss_is_smoothed_over_its_raw_line(rng):
    values = 1 + rng.random(600)
    points = list(enumerate(values))
    figure = figures.learning_curve(curves.Chart("Loss", (curves.Series("train loss", points),)))
    raw, smooth = (line.get_ydata() for line in figure.axes[0].lines)
    np.testing.assert_array_equal(raw, values)
    assert smooth[100:500].std() < 0.3 * values.std()
    np.testing.assert_allclose(smooth[300], values[290:311].mean())
    # The last point is a mean, too: it does not jump to the last raw value.
    np.testing.assert_allclose(smooth[-1], values[-11:].mean())


def test_long_logs_make_small_files(rng):
    points = list(enumerate(rng.random(200_000)))
    chart = curves.Chart("Grad norm", (curves.Series("train grad norm", points),))
    assert len(figures.svg(figures.learning_curve(chart))) < 300_000


def test_one_drawing_has_the_inks_of_light_and_dark_pages():
    figure = figures.confusion_matrix(np.eye(3, dtype=int), ["cat", "dog", figures.INK])
    drawing = figures.svg(figure).decode()
    root = ElementTree.fromstring(drawing)
    style = root.find("{*}style").text
    for number, (light, dark) in enumerate(figures.DARK.items()):
        assert f"--c{number}:{light}" in style.partition("@media")[0]
        assert f"--c{number}:{dark}" in style.partition("prefers-color-scheme:dark")[2]
    texts = {text.text: text.get("style") for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"cat", "dog", figures.INK} <= texts.keys()
    assert "fill: var(--c1)" in texts["cat"]
    assert figures.INK not in drawing.replace(f">{figures.INK}<", "").replace(style, "")
    assert rendered(figure)[0, 0].tolist() == [255, 255, 255]


def test_names_of_users_are_drawn_letter_by_letter(rng):
    for figure in figures_with(list(ODD_NAMES), rng):
        rendered(figure)
        ElementTree.fromstring(figures.svg(figure))


@settings(max_examples=3, deadline=None)
@given(names)
def test_any_name_can_be_drawn(name):
    for figure in figures_with([name, "dog"], np.random.default_rng(0)):
        ElementTree.fromstring(figures.svg(figure))


def figures_with(words, rng):
    """Every figure that shows texts of users, with these."""
    count = len(words)
    images = list(rng.integers(0, 255, (count, 8, 8, 3), np.uint8))
    yield figures.confusion_matrix(np.eye(count, dtype=int), words)
    yield figures.image_grid(images, words, words)
    yield figures.hardest_mistakes(images, np.arange(count), np.roll(np.eye(count), 1, 0), words)
    yield inside.attention_panel(images, {}, words)
    yield inside.attention_panel(images[:1], {word: images[:1] for word in words}, words[:1])
    heads, summaries = rng.random((1, 1, 2, 2)), {word: images[0] for word in words}
    yield inside.attention_heads(images[0], heads, summaries, words[0])
    rows = [{"step": step, **{f"eval/{word}/accuracy": 0.5 for word in words}} for step in (1, 2)]
    yield figures.learning_curves(rows, {})


def test_a_name_with_dollar_signs_is_shown_as_it_is(rng):
    figure = figures.image_grid(rng.integers(0, 255, (1, 4, 4, 3), np.uint8), ["$5_$10"])
    root = ElementTree.fromstring(figures.svg(figure))
    assert [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")] == ["$5_$10"]


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
