"""FlexiViT: resized kernels act on resized patches as the kept ones do on the originals."""

import jax
import numpy as np
import pytest
from golden_trees import random_params

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models.layers.resize import linear_resize_matrix

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("old", "new"), [(8, 5), (5, 8), (7, 7), (4, 9), (16, 3)])
def test_linear_resize_is_jax_image_resize(old, new):
    line = RNG.normal(size=old).astype(np.float32)
    expected = jax.image.resize(line, (new,), "linear", antialias=True)
    np.testing.assert_allclose(linear_resize_matrix(old, new) @ line, expected, atol=1e-5)


def test_grown_kernel_embeds_a_resized_patch_like_the_original():
    kernel = RNG.normal(size=(4, 6, 3, 5)).astype(np.float32)
    patch = RNG.normal(size=(4, 6, 3)).astype(np.float32)
    resized = jax.image.resize(patch, (9, 8, 3), "bilinear")
    grown = models.resize_patch_kernel(kernel, (9, 8))
    np.testing.assert_allclose(
        np.einsum("ijc,ijcd->d", resized, grown),
        np.einsum("ijc,ijcd->d", patch, kernel),
        rtol=1e-3,
        atol=1e-4,
    )


def test_kernel_resize_is_the_pseudo_inverse_of_the_whole_patch():
    kernel = RNG.normal(size=(6, 6, 1, 2)).astype(np.float32)
    resize = np.kron(linear_resize_matrix(6, 4), linear_resize_matrix(6, 4))
    expected = np.linalg.pinv(resize.T) @ kernel.reshape(36, 2)
    shrunk = models.resize_patch_kernel(kernel, (4, 4))
    np.testing.assert_allclose(shrunk.reshape(16, 2), expected, rtol=1e-4, atol=1e-4)


def flexi(**fields):
    tiny = {"width": 32, "depth": 1, "num_heads": 2, "kernel_size": 8, "table_grid": 3}
    return models.build("flexivit_s", num_classes=3, **{**tiny, "patch_size": 4, **fields})


def test_one_set_of_weights_for_every_patch_and_image_size():
    images = RNG.normal(size=(2, 24, 16, 3)).astype(np.float32)
    params = random_params(flexi(), images)
    assert params["backbone"]["patch_embed"]["kernel"].shape == (8, 8, 3, 32)
    assert params["backbone"]["pos_embed"].shape == (1, 9, 32)
    for patch in (4, 6, 8):
        logits = jax.jit(flexi(patch_size=patch).apply)({"params": params}, images)
        assert logits.shape == (2, 3)


def test_at_the_kept_sizes_it_is_a_plain_vit():
    images = RNG.normal(size=(2, 24, 24, 3)).astype(np.float32)
    params = random_params(flexi(), images)
    plain = models.build(
        "vit",
        num_classes=3,
        patch_size=8,
        width=32,
        depth=1,
        num_heads=2,
        mlp_dim=1536,
        class_token_position=False,
    )
    np.testing.assert_allclose(
        jax.jit(flexi(patch_size=8).apply)({"params": params}, images),
        jax.jit(plain.apply)({"params": params}, images),
        rtol=1e-5,
        atol=1e-5,
    )


def test_class_token_position_is_refused():
    with pytest.raises(UserError, match="no position"):
        flexi(class_token_position=True)
