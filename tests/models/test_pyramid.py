"""The feature pyramid: which places of its levels see which cell, and the proposals made there."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.models.heads.pyramid import Pyramid, merge, spread
from vit_jax.types import Features

SCALES = (4.0, 2.0, 1.0, 0.5)


def test_levels_see_the_cells_around_their_places():
    pyramid = Pyramid(SCALES, 6)
    grid = jax.random.normal(jax.random.key(0), (2, 8, 12, 8))
    changed = grid.at[1, 4, 9].add(10.0)
    both = jnp.concatenate([grid, changed])
    levels, _ = jax.jit(pyramid.init_with_output)(jax.random.key(1), both)
    for scale, level in zip(SCALES, levels, strict=True):
        assert level.shape == (4, 8 * scale, 12 * scale, 6)
        differs = np.any(np.asarray(level[:2] != level[2:]), axis=-1)
        # The cell, and one place around it for the 3x3 convolution.
        seen = np.zeros_like(differs)
        rows, columns = (
            slice(math.floor(at * scale) - 1, math.ceil((at + 1) * scale) + 1) for at in (4, 9)
        )
        seen[1, rows, columns] = True
        np.testing.assert_array_equal(differs, seen)


def test_places_inside_cells_keep_their_order():
    image = np.arange(6 * 8).reshape(1, 6, 8, 1)
    cells = image.reshape(1, 3, 2, 2, 4, 1).transpose(0, 1, 3, 2, 4, 5)
    np.testing.assert_array_equal(spread(cells), image)


def test_levels_are_added_up_at_the_finest_ones_places():
    fine, coarse = jnp.arange(32.0).reshape(1, 4, 8, 1), jnp.full((1, 2, 4, 1), 7.0)
    np.testing.assert_allclose(merge([coarse, fine]), fine + 7)


class Grid(nn.Module):
    """A backbone whose grid is its images."""

    @nn.compact
    def __call__(self, images, *, train):
        return Features(grid=images, pooled=None)


def test_proposals_start_as_the_cells_of_every_level():
    detector = models.Detector(Grid(), 3, pyramid=(2.0, 0.5), pyramid_width=8)
    grid = jnp.ones((1, 4, 8, 8))
    (scores, boxes), _ = jax.jit(detector.init_with_output)(jax.random.key(0), grid)
    cells = [
        (row / rows, column / columns, (row + 1) / rows, (column + 1) / columns)
        for rows, columns in ((8, 16), (2, 4))
        for row in range(rows)
        for column in range(columns)
    ]
    np.testing.assert_allclose(boxes[0], cells, atol=1e-6)
    assert scores.shape == (1, len(cells), 3)


def test_it_computes_in_the_backbones_dtype():
    grid = jnp.zeros((1, 2, 2, 8), jnp.bfloat16)
    made = jax.eval_shape(Pyramid((2.0,), 4).init_with_output, jax.random.key(0), grid)
    (level,), variables = made
    assert level.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
