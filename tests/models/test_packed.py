"""Packed sequences: an image's output does not depend on what it is packed with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_trees import random_params

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models.packed import pack

RNG = np.random.default_rng(0)
SIZES = [(12, 8), (8, 8), (4, 20), (16, 12), (8, 16)]
IMAGES = [RNG.normal(size=(*size, 3)).astype(np.float32) for size in SIZES]
FIELDS = {
    "patch_size": 4,
    "kernel_size": 6,
    "table_grid": 3,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_dim": 48,
    "num_classes": 3,
}


def test_first_fit_fills_sequences_in_order():
    packed, homes = pack(IMAGES, patch_size=4, max_tokens=16, max_images=3)
    # 6 + 4 + 5 patches fill the first sequence to 15; 12 open a second, 8 a third.
    assert homes.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0]]
    np.testing.assert_array_equal(packed.segment_ids[0], [1] * 6 + [2] * 4 + [3] * 5 + [0])
    np.testing.assert_array_equal(packed.coordinates[0, 10:15], [[0, i] for i in range(5)])
    np.testing.assert_array_equal(packed.grids[0, 0], [3, 2])
    np.testing.assert_array_equal(packed.patches[0, 1], IMAGES[0][:4, 4:8].reshape(-1))


def test_max_images_opens_a_new_sequence():
    _, homes = pack(IMAGES[:3], patch_size=4, max_tokens=16, max_images=2)
    assert homes.tolist() == [[0, 0], [0, 1], [1, 0]]


def test_an_image_that_fits_no_sequence_is_named():
    with pytest.raises(UserError, match="image 3 has 12 patches"):
        pack(IMAGES, patch_size=4, max_tokens=10, max_images=2)


@pytest.mark.parametrize(
    "fields",
    [
        {"pooling": "map"},
        {"pooling": "token", "position": "rope_mixed", "num_registers": 2},
        {"pooling": "mean", "position": "rope_dinov3", "num_registers": 1},
        {"pooling": "mean", "position": "sincos2d", "attention": "splash"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_every_image_comes_out_as_if_alone(fields):
    packed, homes = pack(IMAGES, patch_size=4, max_tokens=16, max_images=3)
    model = models.build("navit_s16", **{**FIELDS, **fields})
    params = random_params(model, packed)
    logits = jax.jit(model.apply)({"params": params}, packed)
    assert logits.shape == (3, 3, 3)
    assert np.all(np.isfinite(logits))
    logits = np.asarray(logits)
    alone = models.build("flexivit_s", **{**FIELDS, **fields, "attention": "xla"})
    for image, (sequence, place) in zip(IMAGES[:3], homes, strict=False):
        expected = jax.jit(alone.apply)({"params": params}, image[None])[0]
        np.testing.assert_allclose(logits[sequence, place], expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_with_padding_and_missing_images():
    packed, _ = pack(IMAGES, patch_size=4, max_tokens=16, max_images=4)
    model = models.build("navit_s16", **FIELDS)
    params = random_params(model, packed)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, packed)[0, 0] ** 2)))
    leaves = jax.tree.leaves(grads(params))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
    assert any(np.any(leaf) for leaf in leaves)


def test_token_map_is_refused():
    with pytest.raises(UserError, match="packed sequences need pooling"):
        models.build("navit_s16", pooling="none")
