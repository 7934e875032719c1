"""The order of the training stream: pinned values, coverage, and the quality of the shuffle."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_jax.data import sampling

IMAGENET = 1_281_167


def test_permutation_values_are_pinned():
    # A change here changes every training run ever recorded.
    assert sampling.epoch_permutation(0, 0, 1797)[:6].tolist() == [1187, 1682, 883, 1601, 956, 75]
    assert sampling.epoch_permutation(7, 3, 1797)[:6].tolist() == [1387, 1279, 704, 449, 793, 838]
    # The windows of the groups end at different places.
    blocks = sampling.BlockShuffle((4,) * 6, window=2, groups=3)
    assert sampling.block_permutation(0, 0, blocks).tolist() == [
        [0, 23, 22, 1, 2, 3, 21, 20],
        [6, 4, 5, 7, 8, 9, 11, 10],
        [16, 17, 18, 12, 14, 15, 19, 13],
    ]


def test_augment_seeds_are_pinned():
    seeds = sampling.augment_seeds(3, np.array([0, 1, 2**40]))
    assert seeds.dtype == np.int32
    assert seeds.tolist() == [
        [-1767798633, -1127350884],
        [1651511731, -330540050],
        [790935017, 225706298],
    ]


@given(st.integers(0, 2**63 - 1), st.integers(0, 50), st.integers(1, 300))
def test_epoch_covers_every_example_once(seed, epoch, num_examples):
    order = sampling.epoch_permutation(seed, epoch, num_examples)
    assert np.array_equal(np.sort(order), np.arange(num_examples))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 9), st.integers(1, 8))
def test_block_order_covers_every_example_at_most_once(lengths, window, groups):
    blocks = sampling.BlockShuffle(tuple(lengths), window, groups)
    order = sampling.block_permutation(5, 2, blocks)
    assert order.shape == (groups, sum(lengths) // groups)
    assert len(np.unique(order)) == order.size
    assert order.size == 0 or (order.min() >= 0 and order.max() < sum(lengths))


def test_block_order_reads_a_window_at_a_time():
    blocks = sampling.BlockShuffle((16,) * 48, window=2, groups=4)
    order = sampling.block_permutation(0, 0, blocks)
    assert sorted(order.ravel()) == list(range(16 * 48))
    parts = [set(records // 16) for records in order]
    assert sum(map(len, parts)) == 48  # No block is read for two groups.
    # In any stretch of a window's length, a part touches three windows' blocks at most.
    for records in order:
        for first in range(len(records) - 32):
            assert len(set(records[first : first + 32] // 16)) <= 6
    assert not np.array_equal(order, sampling.block_permutation(0, 1, blocks))
    neighbours = np.diff(order) == 1
    assert neighbours.mean() < 0.1


def test_rows_of_a_batch_keep_to_their_groups():
    blocks = sampling.BlockShuffle((16,) * 48, window=2, groups=4)
    order = sampling.block_permutation(7, 0, blocks)
    seen = []
    for step in range(48):
        positions = sampling.train_positions(step, 16)
        indices, epochs = sampling.example_in_blocks(positions, 16, 7, blocks)
        assert (epochs == 0).all()
        for group, four in enumerate(indices.reshape(4, 4)):
            assert set(four) <= set(order[group])
        some = np.array([3, 9, 14])
        part, _ = sampling.example_in_blocks(positions[some], 16, 7, blocks)
        assert np.array_equal(part, indices[some])
        seen += indices.tolist()
    assert sorted(seen) == list(range(16 * 48))
    _, epochs = sampling.example_in_blocks(sampling.train_positions(48, 16), 16, 7, blocks)
    assert (epochs == 1).all()


def test_groups_adapt_to_batches_that_they_do_not_divide():
    blocks = sampling.BlockShuffle((5, 3), window=1, groups=8)
    indices, epochs = sampling.example_in_blocks(np.arange(24), 12, 0, blocks)
    assert np.bincount(indices).tolist() == [3] * 8
    assert epochs.max() == 2


@given(st.integers(0, 10**6), st.integers(1, 64), st.integers(1, 200), st.integers(0, 2**31))
def test_batches_straddle_epochs(step, batch_size, num_examples, seed):
    positions = sampling.train_positions(step, batch_size)
    indices, epochs = sampling.example_at(positions, num_examples, seed)
    for position, index, epoch in zip(positions, indices, epochs, strict=True):
        assert epoch == position // num_examples
        order = sampling.epoch_permutation(seed, int(epoch), num_examples)
        assert index == order[position % num_examples]


def test_positions_are_64_bit():
    positions = sampling.train_positions(10**9, 16_384)
    assert positions[0] == 10**9 * 16_384
    seeds = sampling.augment_seeds(0, np.concatenate([positions, positions % 2**32]))
    assert len(np.unique(seeds, axis=0)) == 2 * len(positions)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_augment_seeds_are_unique_and_differ_between_seeds(seed):
    positions = np.arange(200_000)
    seeds = sampling.augment_seeds(seed, positions)
    assert len(np.unique(seeds, axis=0)) == len(positions)
    assert not np.array_equal(seeds, sampling.augment_seeds(seed + 1, positions))
    # Each bit is a fair coin: 200,000 draws stay within five standard deviations.
    bits = np.unpackbits(seeds.view(np.uint8).reshape(len(seeds), -1), axis=1)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(seeds))


def rank_correlation(a, b):
    return np.corrcoef(a, b)[0, 1] * np.sqrt(len(a))  # In standard deviations of chance.


@pytest.mark.parametrize("num_examples", [1797, IMAGENET])
def test_shuffle_shows_no_correlation_beyond_chance(num_examples):
    num_epochs = 4 if num_examples == IMAGENET else 12
    orders = [sampling.epoch_permutation(0, epoch, num_examples) for epoch in range(num_epochs)]
    places = [np.argsort(order) for order in orders]
    z_scores = []
    for one, other in itertools.pairwise(places):
        z_scores.append(rank_correlation(one, other))  # Place of an example in two epochs.
    for order, place in zip(orders, places, strict=True):
        z_scores.append(rank_correlation(order[:-1], order[1:]))  # Neighbours in a batch.
        z_scores.append(rank_correlation(place[:-1], place[1:]))  # Neighbours in the source.
        z_scores.append(rank_correlation(order, np.arange(num_examples)))
    assert np.abs(z_scores).max() < 4.5
    assert 0.5 < np.std(z_scores) < 1.6


def test_neighbouring_seeds_and_epochs_do_not_share_orders():
    firsts = {
        tuple(sampling.epoch_permutation(seed, epoch, IMAGENET)[:4])
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len(firsts) == 4


def test_repeated_examples_share_a_batch_far_apart():
    batch_size, repeats = 12, 3
    positions = sampling.train_positions(5, batch_size)
    drawn_at = sampling.repeated_positions(positions, batch_size, repeats)
    assert drawn_at.tolist() == [20, 21, 22, 23] * 3
    assert len(np.unique(sampling.augment_seeds(0, positions), axis=0)) == batch_size


def test_replacement_is_a_pure_function_of_its_position():
    for seed, expected in {1: [544, 172, 561, 891, 500], 2: [52, 975, 789, 875, 846]}.items():
        draws = [sampling.replacement(77, attempt, 1000, seed) for attempt in range(1, 6)]
        assert draws == expected  # A change here changes recorded runs.
