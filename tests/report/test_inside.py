"""Figures of a model's inside: what they show, read off the artists; that they render at all."""

import numpy as np
import pytest
from drawn import pictures, rendered, texts

from vit_jax.report import inside


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_attention_panel_has_a_row_for_each_kind(rng):
    images = list(rng.integers(0, 255, (3, 6, 9, 3), np.uint8))
    overlays = {"last layer": images, "rollout": images}
    figure = inside.attention_panel(images, overlays, ["a", "b", "c"])
    assert len(figure.axes) == 9 + 1  # The scale of the colors.
    assert {"image", "last layer", "rollout", "a", "b", "c"} <= set(texts(figure))
    rendered(figure)


def test_attention_panel_of_many_images_has_several_lines(rng):
    images = list(rng.integers(0, 255, (11, 6, 9, 3), np.uint8))
    captions = [f"caption {number}" for number in range(11)]
    figure = inside.attention_panel(images, {"rollout": images}, captions)
    assert len(figure.axes) == 22 + 1
    assert set(captions) <= {text.strip() for text in texts(figure)}
    tops = {round(axes.get_position().y1, 3) for axes in figure.axes[:-1]}
    assert len(tops) == 4
    assert texts(figure).count("rollout") == 2
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
    figure = inside.attention_heads(np.zeros((4, 8), np.uint8), heads, {}, title="cat.jpg")
    shown = cells_of(figure, 1, (3, 2), (2, 4))
    np.testing.assert_allclose(shown, heads / heads.max(axis=(2, 3), keepdims=True), rtol=1e-6)
    assert {"cat.jpg", "layer", "head", "image"} <= set(texts(figure))
    rendered(figure)


def test_position_similarity_is_the_cosine(rng):
    pos_embed = rng.normal(size=(2, 3, 16))
    figure = inside.position_similarity(pos_embed)
    flat = pos_embed.reshape(6, 16)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    expected = (unit @ unit.T).reshape(2, 3, 2, 3)
    np.testing.assert_allclose(cells_of(figure, 0, (2, 3), (2, 3)), expected, atol=1e-6)
    rendered(figure)


def test_position_similarity_thins_large_grids(rng):
    figure = inside.position_similarity(rng.normal(size=(24, 30, 8)), max_side=6)
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
    figure = inside.patch_filters(kernel, count=2)
    first, second = (np.asarray(picture)[..., 0] / 255 for picture in pictures(figure))
    np.testing.assert_allclose(first, 0.5 + 0.5 * one[..., 0], atol=0.01)
    largest = np.abs(second - 0.5)
    np.testing.assert_allclose(largest, 0.5 * np.abs(two[..., 0]), atol=0.01)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_patch_filters_of_any_channels_draw(rng, channels):
    figure = inside.patch_filters(rng.normal(size=(2, 3, channels, 5)))
    assert len(figure.axes) == 5
    rendered(figure)


def test_distances_are_drawn_by_layer_beside_what_convolutions_reach():
    far = np.array([[1.0, 2.0], [1.5, 0.5], [2.0, 2.5]])
    figure = inside.attention_distances(far, (3, 4))
    (axes,) = figure.axes
    *heads, _, reach = axes.lines
    for line, expected in zip(heads, far.T, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_array_equal(line.get_ydata(), expected)
    # One step along the diagonal a layer, no further than from corner to corner.
    corner = np.hypot(2, 3)
    np.testing.assert_allclose(reach.get_ydata(), [2**0.5, 2 * 2**0.5, corner])
    rendered(figure)


def test_an_image_in_patches_is_drawn_whole_apart_and_in_order(rng):
    image = rng.integers(0, 255, (7, 9, 3), np.uint8)  # a row and a column beyond whole patches
    figure = inside.image_in_patches(image, (2, 4))
    whole, *tiles = pictures(figure)
    np.testing.assert_array_equal(whole, image)
    assert len(tiles) == 2 * 6
    expected = [image[y : y + 2, x : x + 4] for y in (0, 2, 4) for x in (0, 4)]
    for shown, patch in zip(tiles, 2 * expected, strict=True):
        np.testing.assert_array_equal(shown, patch)
    assert {"image, 7×9 pixels", "3×2 patches of 2×4", "the sequence"} <= set(texts(figure))
    rendered(figure)


def test_of_many_patches_the_first_are_shown_in_sequence():
    figure = inside.image_in_patches(np.zeros((16, 16, 1), np.uint8), (2, 2), limit=20)
    assert "the first 20 of a sequence of 64" in texts(figure)
    assert len(figure.axes) == 1 + 64 + 20
