"""Positions, class tokens, patches and channels of another size."""

import json

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN

from vit_jax.checkpoints.fit import surgery
from vit_jax.errors import UserError

POSITIONS = GOLDEN / "vision_transformer" / "posemb_interpolation"
ENTRIES = json.loads(POSITIONS.with_suffix(".json").read_text())["entries"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_positions_as_vision_transformer_resizes_them(entry):
    io = np.load(f"{POSITIONS}.io.npz")
    before, after = io[f"{entry['name']}/before"], io[f"{entry['name']}/after"]
    row, patches = surgery.split_class_row(before, has_class_token=entry["has_class_token"])
    old, new = ((entry[k], entry[k]) for k in ("grid_before", "grid_after"))
    assert surgery.infer_grid(patches.shape[1], new) == old
    resized = surgery.resize_positions(patches, old, new)
    if row is not None:
        resized = np.concatenate([row, resized], axis=1)
    np.testing.assert_allclose(resized, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("interpolation", "method"), [("bilinear", "linear"), ("bicubic", "cubic")]
)
@pytest.mark.parametrize(("old", "new"), [((4, 6), (7, 3)), ((5, 5), (5, 9)), ((6, 2), (2, 2))])
def test_antialiased_positions_as_jax_image_resizes_them(interpolation, method, old, new):
    table = np.random.default_rng(0).normal(size=(*old, 3)).astype(np.float32)
    expected = jax.image.resize(table, (*new, 3), method, antialias=True)
    actual = surgery.resize_positions(table.reshape(1, -1, 3), old, new, interpolation)
    np.testing.assert_allclose(actual[0], expected.reshape(-1, 3), atol=1e-5)


def test_plain_bilinear_positions_skip_the_patches_between():
    """PyTorch's bilinear without antialiasing: 6 to 2 takes the patches 1 and 4 alone."""
    table = np.arange(12, dtype=np.float32).reshape(1, 12, 1)
    down = surgery.resize_positions(table, (2, 6), (2, 2), "torch_bilinear")
    np.testing.assert_array_equal(down.ravel(), [1, 4, 7, 10])
    up = surgery.resize_positions(table[:, :2], (1, 2), (1, 4), "torch_bilinear")
    np.testing.assert_array_equal(up.ravel(), [0, 0.25, 0.75, 1])


def test_positions_that_keep_the_aspect_are_a_part_of_a_square():
    table = np.random.default_rng(0).normal(size=(1, 12, 2)).astype(np.float32)
    square = surgery.resize_positions(table, (3, 4), (5, 5), "bicubic").reshape(5, 5, 2)
    wide = surgery.resize_positions(table, (3, 4), (2, 5), "bicubic", keeps_aspect=True)
    np.testing.assert_array_equal(wide.reshape(2, 5, 2), square[:2])


def test_unchanged_grid_returns_the_table_itself():
    table = np.random.default_rng(0).normal(size=(1, 6, 3)).astype(np.float32)
    for interpolation in surgery.INTERPOLATIONS:
        assert surgery.resize_positions(table, (2, 3), (2, 3), interpolation) is table


def test_unknown_interpolation_suggests():
    with pytest.raises(UserError, match="bicubic"):
        surgery.resize_positions(np.zeros((1, 4, 1)), (2, 2), (3, 3), "bicubik")


def test_perfect_squares_are_exact():
    for side in (1, 14, 10**8, 94906267):
        assert surgery.square_side(side * side) == side
        assert surgery.square_side(side * side + 1) is None
    assert surgery.square_side(0) is None
    assert surgery.square_side((10**8) ** 2 - 1) is None


@pytest.mark.parametrize(
    ("tokens", "has_class_token", "has_row"),
    [
        (196, True, False),
        (197, True, True),
        (196, False, False),
        (197, False, False),
        (1, True, False),
    ],
)
def test_class_rows_are_told_by_squares(tokens, has_class_token, has_row):
    table = np.arange(tokens * 2, dtype=np.float32).reshape(1, tokens, 2)
    row, patches = surgery.split_class_row(table, has_class_token=has_class_token)
    assert (row is not None, patches.shape[1]) == (has_row, tokens - has_row)
    np.testing.assert_array_equal(patches, table[:, int(has_row) :])


def test_class_rows_of_other_grids_follow_the_target():
    table = np.zeros((1, 33, 2), np.float32)  # 4 x 8 and a class token, or 3 x 11

    def patches(**known):
        return surgery.split_class_row(table, has_class_token=True, **known)[1].shape[1]

    assert [patches(num_patches=n) for n in (32, 33, 49)] == [32, 33, 33]
    assert [patches(assumed=row) for row in (True, False)] == [32, 33]
    assert patches(row_stored=True, num_patches=33) == 32


def test_grids_are_inferred_unless_ambiguous():
    assert surgery.infer_grid(24, (4, 6)) == (4, 6)
    assert surgery.infer_grid(36, (6, 6)) == (6, 6)
    assert surgery.infer_grid(36, (5, 5)) == (6, 6)
    for target in ((4, 9), (9, 4)):
        with pytest.raises(UserError, match=rf"either 6x6 or {target[0]}x{target[1]}"):
            surgery.infer_grid(36, target)
    with pytest.raises(UserError, match="no square grid"):
        surgery.infer_grid(24, (5, 5))


@pytest.mark.parametrize(("held", "wanted"), [(3, 1), (3, 2), (3, 4), (3, 8), (1, 3), (4, 3)])
def test_channels_keep_the_response_to_equal_channels(held, wanted):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 2, held, 5)).astype(np.float32)
    grey = rng.normal(size=(2, 2, 1)).astype(np.float32)
    changed = surgery.adapt_channels(kernel, wanted)
    assert changed.shape == (2, 2, wanted, 5)
    np.testing.assert_allclose(
        np.einsum("hwc,hwcd->d", grey.repeat(wanted, 2), changed),
        np.einsum("hwc,hwcd->d", grey.repeat(held, 2), kernel),
        rtol=1e-4,
        atol=1e-5,
    )


def test_patches_keep_their_response_when_they_grow():
    """The pseudo-inverse: <resized patch, new kernel> = <patch, kernel>."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 4, 3, 5)).astype(np.float32)
    patch = rng.normal(size=(4, 4, 3)).astype(np.float32)
    grown = jax.image.resize(patch, (7, 6, 3), "linear", antialias=True)
    changed = surgery.resize_patches(kernel, (7, 6))
    np.testing.assert_allclose(
        np.einsum("hwc,hwcd->d", grown, changed),
        np.einsum("hwc,hwcd->d", patch, kernel),
        atol=1e-4,
    )
