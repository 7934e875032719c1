"""Attention within windows: the formula on each window alone, whatever is padded."""

import jax
import numpy as np
import pytest
from golden_trees import random_params

from vit_jax import models
from vit_jax.parallel import sharding

# A grid of 3 by 4 patches: windows of 2 are cut off below, and one of 4 is padded.
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 16, 3)).astype(np.float32)
TINY = {"patch_size": 4, "width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48, "scan": False}


def build(**fields):
    return models.build("vit", **{**TINY, "pooling": "mean", "position": "rope", **fields})


@pytest.fixture(scope="module")
def params():
    return random_params(build(), IMAGES)


def grid(params, images=IMAGES, **fields):
    model = build(**fields)
    return jax.jit(lambda p, x: model.apply({"params": p}, x).grid)(params, images)


def weights(params, **fields):
    """Returns the probabilities `[heads, tokens, tokens]` of each block, and the grid."""
    model = build(**fields)
    features, sown = jax.jit(lambda p, x: model.apply({"params": p}, x, mutable=["intermediates"]))(
        params, IMAGES
    )
    blocks = sown["intermediates"]
    return [blocks[f"blocks_{i}"]["attn"]["attention"][0][0] for i in range(2)], features.grid


@pytest.mark.parametrize("window", [4, 7])
def test_a_window_over_the_whole_grid_is_full_attention(params, window):
    np.testing.assert_allclose(grid(params, window=window), grid(params), atol=1e-5)


def test_each_window_is_seen_as_an_image_of_its_own(params):
    whole = np.asarray(grid(params, window=2, position="none"))
    for rows in (slice(0, 2), slice(2, 3)):
        for columns in (slice(0, 2), slice(2, 4)):
            part = IMAGES[:, 4 * rows.start : 4 * rows.stop, 4 * columns.start : 4 * columns.stop]
            alone = grid(params, part, position="none")
            np.testing.assert_allclose(whole[:, rows, columns], alone, atol=1e-5)


def test_weights_are_sown_over_the_whole_grid(params):
    (within, everywhere), seen = weights(params, window=2, global_blocks=(1,))
    np.testing.assert_allclose(seen, grid(params, window=2, global_blocks=(1,)), atol=1e-5)
    row, column = np.indices((3, 4)).reshape(2, -1) // 2
    same = (row[:, None] == row) & (column[:, None] == column)
    np.testing.assert_array_equal(within > 0, np.broadcast_to(same, within.shape))
    np.testing.assert_allclose(within.sum(-1), 1, atol=1e-5)
    assert (everywhere > 0).all()


def test_a_mesh_changes_nothing(params):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, devices=jax.devices()[:4])
    with sharding.activate(mesh):
        spread = grid(params, window=2)
    np.testing.assert_allclose(spread, grid(params, window=2), atol=1e-5)


def test_windows_cost_less():
    full, within = (models.flops(build(window=window), (128, 128)) for window in (0, 8))
    # Two products over 1,024 or 64 keys, for 1,024 queries of 32 channels, in two blocks.
    assert full - within == 2 * 2 * 2 * 1024 * (1024 - 64) * 32
