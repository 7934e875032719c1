"""Pictures of frozen features: colors of patches, nearest neighbors; patches hidden by a mask."""

import types

import numpy as np
from self_supervised_tiny import METHODS, info, model_of

from vit_jax import tasks
from vit_jax.report.contact_sheet import dimmed
from vit_jax.training import embeddings


def test_patches_that_are_alike_have_one_color():
    draw = np.random.default_rng(0)
    kinds = draw.normal(size=(3, 16))
    which = draw.integers(0, 3, (2, 4, 5))
    colors = embeddings.component_colors(kinds[which] + 1e-6 * draw.normal(size=(2, 4, 5, 16)))
    assert colors.shape == (2, 4, 5, 3)
    assert colors.dtype == np.uint8
    of_kind = [colors[which == kind][:, :2].astype(int) for kind in range(3)]
    assert max(np.ptp(rows, axis=0).max() for rows in of_kind) <= 2
    means = [rows.mean(0) for rows in of_kind]
    assert min(np.abs(means[i] - means[i - 1]).max() for i in range(3)) > 50
    enlarged = embeddings.enlarged(colors[0], (8, 10))
    np.testing.assert_array_equal(enlarged[::2, ::2], colors[0])
    assert embeddings.component_colors(np.ones((1, 2, 2, 2))).shape == (1, 2, 2, 3)


def test_neighbors_are_the_nearest_others():
    angles = np.radians([0, 90, 2, 40, 181])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1) * np.arange(1, 6)[:, None]
    order, cosines = embeddings.nearest(vectors)
    assert order.shape == (4, 4)  # Of five images each has four others.
    assert list(order[0]) == [2, 3, 1, 4]
    np.testing.assert_allclose(cosines[0, :2], np.cos(np.radians([2, 40])))
    assert list(order[1][:1]) == [3]


def test_features_of_any_number_of_images_are_in_their_order(monkeypatch):
    """They are computed in chunks of one size, of which the last one is filled up."""

    def apply(variables, images):
        return types.SimpleNamespace(vector=lambda: images.mean((1, 2)), grid=images)

    backbone = types.SimpleNamespace(apply=apply)
    task = types.SimpleNamespace(
        model=types.SimpleNamespace(backbone=backbone), inputs=lambda batch: batch["image"]
    )
    monkeypatch.setattr(embeddings, "_CHUNK", 4)
    images = np.arange(10 * 2 * 2 * 3, dtype=np.float32).reshape(10, 2, 2, 3)
    for count in (10, 3):
        vectors, grids = embeddings.features(task, {"backbone": {}}, images[:count])
        np.testing.assert_allclose(vectors, images[:count].mean((1, 2)))
        np.testing.assert_array_equal(grids, images[: min(count, 4)])


def test_features_become_sections(monkeypatch):
    grids = np.random.default_rng(0).normal(size=(6, 4, 4, 8)).astype(np.float32)
    monkeypatch.setattr(embeddings, "features", lambda *_: (grids.mean((1, 2)), grids))
    images = {"image": np.zeros((6, 8, 8, 3), np.uint8)}
    found = embeddings.sections(types.SimpleNamespace(), {}, images)
    assert [section.title for section in found] == ["Patches as colors", "Nearest neighbors"]
    monkeypatch.setattr(embeddings, "features", lambda *_: (grids[:1].mean((1, 2)), None))
    assert embeddings.sections(types.SimpleNamespace(), {}, {"image": images["image"][:1]}) == []


def test_hidden_patches_are_drawn_dark():
    def task(method):
        return tasks.build({"name": method, **METHODS[method]}, model_of(method), info())

    masked = np.zeros((1, 16), bool)
    masked[0, :4] = True
    crops = np.stack([masked, ~masked], 1)
    batches = {
        "masked": {"restore": np.where(masked, 5, 0)},
        "simmim": {"masked": masked},
        "ijepa": {
            "context": np.array([[[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0]]]),
            "context_counts": np.arange(13)[None, None] < 12,
        },
    }
    for method, batch in batches.items():
        hidden = task(method).hidden(batch)["image"]
        np.testing.assert_array_equal(hidden, masked.reshape(1, 4, 4), method)
    hidden = task("dinov2").hidden({"masked": crops})["global"]
    images = np.full((1, 2, 8, 8, 3), 100, np.uint8)
    images[:, :, 0, 0] = 0
    drawn = dimmed({"global": images, "label": np.zeros(1)}, {"global": hidden})["global"]
    assert (drawn[0, 0, 1:2] == 20).all()
    assert (drawn[0, 0, 2:] == 100).all()
    assert (drawn[0, 1, 2:] == 20).all()
    assert task("dino").hidden({}) == {}
