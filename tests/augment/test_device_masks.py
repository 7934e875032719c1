"""Masks that are drawn inside a step keep to the rules of the host's."""

import jax
import numpy as np
import pytest

from vit_jax.augment import device_masks
from vit_jax.augment.masks import BlockRule, MultiBlockRule, numbers_at


def test_cells_are_masked_whole_and_always_as_many():
    draw = jax.jit(lambda key: device_masks.cell_masks(key, 16, (8, 12), 2, 0.6))
    masks = np.asarray(draw(jax.random.key(0)))
    cells = masks.reshape(16, 4, 2, 6, 2)
    assert (cells.all((2, 4)) == cells.any((2, 4))).all()
    assert (masks.sum((1, 2)) == 4 * 15).all()
    assert len({mask.tobytes() for mask in masks}) == 16


def test_blocks_of_dinov2_mask_the_same_shares_as_on_the_host():
    rule = BlockRule(14, 14, 98)
    draw = jax.jit(lambda key: device_masks.block_masks(key, 64, rule))
    masks = np.asarray(draw(jax.random.key(1)))
    counts = np.sort(masks.sum(1))
    assert (counts[:32] == 0).all()
    # Request k is a share of the k-th part; blocks do not always fill it.
    wanted = 196 * (0.1 + 0.4 * np.arange(1, 33) / 32)
    assert (counts[32:] <= wanted).all()
    numbers = numbers_at(0, 1)
    host = np.sort([rule.draw(int(count), numbers).sum() for count in wanted])
    assert counts[32:].mean() == pytest.approx(host.mean(), rel=0.05)
    assert (masks == np.asarray(draw(jax.random.key(1)))).all()
    assert (masks != np.asarray(draw(jax.random.key(2)))).any()
    # The crops that are masked are any of them, and the blocks lie anywhere.
    assert 8 <= masks[:32].any(1).sum() <= 24
    many = np.concatenate([np.asarray(draw(jax.random.key(seed))) for seed in range(8)])
    many = many[(many.sum(1) > 0) & (many.sum(1) < 60)].reshape(-1, 14, 14)
    centers = np.transpose([np.argwhere(mask).mean(0) for mask in many])
    assert abs(np.corrcoef(centers)[0, 1]) < 0.25


def test_sizes_of_contexts_do_not_follow_those_of_targets():
    any_size = {"target_scale": (0.1, 0.6), "target_aspect": (1.0, 1.0)}
    rule = MultiBlockRule(
        8, 8, **any_size, context_scale=(0.1, 0.6), num_targets=1, min_keep=0, overlap=True
    )
    size = device_masks.most_context_patches(rule)

    def counts(key):
        return [
            blocks.counts.sum() for blocks in device_masks.multi_block_masks(key, 1, rule, size)
        ]

    context, target = jax.jit(jax.vmap(counts))(jax.random.split(jax.random.key(0), 40))
    assert abs(np.corrcoef(context, target)[0, 1]) < 0.6
    assert np.ptp(context) > 20
    assert np.ptp(target) > 20


@pytest.mark.parametrize("overlap", [False, True])
def test_multi_block_masks_of_ijepa_are_rectangles_and_contexts_leave_targets_out(overlap):
    rule = MultiBlockRule(8, 8, min_keep=4, overlap=overlap)
    size = device_masks.most_context_patches(rule)
    draw = jax.jit(lambda key: device_masks.multi_block_masks(key, 6, rule, size))
    for seed in range(3):
        context, target = jax.device_get(draw(jax.random.key(seed)))
        count = int(target.counts[0, 0].sum())
        for image in range(6):
            for block in target.numbers[image]:
                rows, columns = np.divmod(block[:count], 8)
                assert count == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
                assert rows.max() < 7
                assert columns.max() < 7
            seen = context.numbers[image, 0][context.counts[image, 0]]
            assert len(seen) > 4
            assert (np.diff(seen) > 0).all()
            targets = np.unique(target.numbers[image][:, :count])
            assert overlap or not np.intersect1d(seen, targets).size


def test_contexts_of_a_group_have_the_length_of_its_shortest():
    rule = MultiBlockRule(8, 8, min_keep=4)
    size = device_masks.most_context_patches(rule)
    lengths = {}
    for groups in (1, 2, 6):
        draw = jax.jit(lambda key, n=groups: device_masks.multi_block_masks(key, 6, rule, size, n))
        context, _ = jax.device_get(draw(jax.random.key(1)))
        lengths[groups] = context.counts[:, 0].sum(-1)
    assert len(set(lengths[6])) > 1
    np.testing.assert_array_equal(lengths[2], lengths[6].reshape(2, 3).min(1).repeat(3))
    np.testing.assert_array_equal(lengths[1], lengths[6].min())


def test_a_context_that_targets_cover_may_overlap_the_last_of_them():
    rule = MultiBlockRule(8, 8, target_scale=(0.5, 0.6), context_scale=(0.2, 0.3), min_keep=8)
    draw = jax.jit(lambda key: device_masks.multi_block_masks(key, 2, rule, 20))
    context, _ = jax.device_get(draw(jax.random.key(0)))
    assert (context.counts.sum(-1) > 8).all()
