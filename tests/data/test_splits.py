"""Folds and parts of classes: pure functions of a seed, stratified, groups whole."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vit_jax.data import balanced, class_counts, open_source
from vit_jax.data.sampling import BlockShuffle
from vit_jax.data.sources._balanced import copies
from vit_jax.data.sources._splits import folds, per_class, select, split_range
from vit_jax.errors import UserError

LABELS = np.repeat([0, 1, 2], [60, 30, 11])


@given(
    st.lists(st.integers(-1, 4), min_size=2, max_size=60),
    st.integers(2, 6),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=30)
def test_folds_divide_the_examples_and_each_class_evenly(classes, count, seed):
    classes = np.array(classes)
    found = folds(classes, count, seed=seed)
    np.testing.assert_array_equal(found, folds(classes, count, seed=seed))
    for of_class in [classes >= -1, *(classes == one for one in set(classes.tolist()))]:
        sizes = np.bincount(found[of_class], minlength=count)
        assert sizes.max() - sizes.min() <= 1
        assert len(sizes) == count


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=2, max_size=60),
    st.integers(2, 4),
    st.integers(0, 9),
)
@settings(max_examples=30)
def test_a_fold_never_divides_a_group(rows, count, seed):
    classes, groups = np.array(rows).T
    found = folds(classes, count, groups, seed)
    for group in set(groups.tolist()):
        assert len(set(found[groups == group].tolist())) == 1


def test_folds_of_groups_keep_the_shares_of_the_classes():
    """60 patients with 1 to 10 images each; a patient has one class."""
    sizes = np.random.default_rng(0).integers(1, 11, 60)
    groups = np.repeat(np.arange(60), sizes)
    classes = groups % 3
    found = folds(classes, 5, groups)
    shares = np.array([np.bincount(classes[found == fold], minlength=3) for fold in range(5)])
    assert np.abs(shares / shares.sum(0) - 0.2).max() < 0.02


def test_another_seed_gives_other_folds():
    assert (folds(LABELS, 5, seed=0) != folds(LABELS, 5, seed=1)).any()
    # Runs are resumed: the folds of a seed are fixed for good.
    assert np.flatnonzero(folds(LABELS, 5) == 0)[:6].tolist() == [4, 5, 6, 10, 14, 18]


def test_a_fold_and_the_others_are_the_whole():
    held, others = select("train[fold 2 of 5]", LABELS), select("x[all but fold 2 of 5]", LABELS)
    assert len(held) == pytest.approx(len(LABELS) / 5, abs=1)
    np.testing.assert_array_equal(np.sort(np.concatenate([held, others])), np.arange(len(LABELS)))


def test_a_part_of_each_class_has_every_class_and_lies_in_larger_parts():
    parts = [select(f"train[{text} per class]", LABELS) for text in ("1%", "10%", "50%", "100%")]
    counts = [np.bincount(LABELS[part], minlength=3).tolist() for part in parts]
    assert counts == [[1, 1, 1], [6, 3, 1], [30, 15, 6], [60, 30, 11]]
    for small, large in itertools.pairwise(parts):
        assert set(small) <= set(large)
    few = select("train[20 per class]", LABELS, seed=3)
    assert np.bincount(LABELS[few]).tolist() == [20, 20, 11]
    assert (np.diff(few) > 0).all()
    assert (
        per_class(LABELS, 5, is_percent=False) != per_class(LABELS, 5, is_percent=False, seed=1)
    ).any()


def test_parts_apply_one_after_another():
    train = select("train[all but fold 1 of 10]", LABELS)
    few = select("train[all but fold 1 of 10][2 per class]", LABELS)
    assert len(few) == 6
    assert set(few) < set(train)
    assert select("train[:40][-5:]", LABELS).tolist() == [35, 36, 37, 38, 39]


def test_several_labels_are_stratified_by_the_rarest():
    labels = np.zeros((100, 3), np.uint8)
    labels[:, 0] = 1
    labels[:20, 1] = 1
    labels[:5, 2] = 1
    held = select("train[fold 1 of 5]", labels)
    assert labels[held].sum(0).tolist() == [20, 4, 1]
    assert len(select("train[fold 1 of 5]", np.zeros((10, 3)))) == 2


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[fold 6 of 5]", "there is no fold 6 of 5"),
        ("train[fold 0 of 5]", "there is no fold 0 of 5"),
        ("train[fold 1 of 1]", "there is no fold 1 of 1"),
        ("train[fold one of 5]", "is not understood"),
        ("train[5:5]", "selects none of 101"),
        ("train[:10][20:]", "selects none of 10"),
        ("train[0 per class]", "write a whole number from 1 on, or percent up to 100"),
        ("train[1.5 per class]", "write a whole number from 1 on"),
        ("train[0.0% per class]", "write a whole number from 1 on"),
        ("train[101% per class]", "percent up to 100"),
        ("train[:10", "is not understood"),
        ("train[]", "is not understood"),
    ],
)
def test_a_wrong_split_is_answered(split, message):
    with pytest.raises(UserError, match=message):
        select(split, LABELS)


def test_groups_are_not_divided_by_numbers():
    with pytest.raises(UserError, match=r"would divide groups of images; write a fold"):
        select("train[:10]", LABELS, np.arange(101))


def test_sources_without_classes_say_so():
    with pytest.raises(UserError, match="no classes to draw folds from"):
        split_range("train[fold 1 of 5]", 10)


def test_folders_and_arrays_have_folds(tmp_path):
    for patient, number in itertools.product(range(6), range(2)):
        path = tmp_path / "photos" / "ab"[patient % 2] / f"p{patient}_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), 40 * patient).save(path)
    spec = {"source": "folder", "name": str(tmp_path / "photos"), "group": r"/(p\d)"}
    held = open_source(spec | {"split": "train[fold 1 of 3]"})
    rest = open_source(spec | {"split": "train[all but fold 1 of 3]", "split_seed": 0})
    patients = [
        {one.describe(i).split("/")[-1][:2] for i in range(len(one))} for one in (held, rest)
    ]
    assert [len(held), len(rest)] == [4, 8]
    assert not set.intersection(*patients)
    with pytest.raises(UserError, match=r"group='x' does not match"):
        open_source(spec | {"group": "x"})
    with pytest.raises(UserError, match="is no regular expression"):
        open_source(spec | {"group": "("})

    np.savez(tmp_path / "a.npz", image=np.zeros((101, 2, 2, 1), np.uint8), label=LABELS)
    spec = {"source": "npz", "name": str(tmp_path / "a.npz"), "split": "train[2 per class]"}
    few, other = (open_source(spec | {"split_seed": seed}) for seed in (0, 1))
    assert sorted(few.fetch(np.arange(6))["label"]) == [0, 0, 1, 1, 2, 2]
    assert few.fingerprint != other.fingerprint


@given(st.floats(0, 1), st.integers(0, 9))
@settings(max_examples=20)
def test_rare_classes_are_repeated_by_the_power_of_their_rarity(balance, seed):
    found = copies(LABELS, balance, seed)
    np.testing.assert_array_equal(found, copies(LABELS, balance, seed))
    counts = np.bincount(LABELS)
    expected = counts * (counts.max() / counts) ** balance
    assert np.abs(np.bincount(LABELS, found) - expected).max() <= 1
    assert found.min() == 1
    several = copies(np.eye(3, dtype=np.uint8)[LABELS], balance, seed)
    assert np.abs(np.bincount(LABELS, several) - expected).max() <= 1


def test_which_examples_of_a_rare_class_are_repeated_is_drawn_by_the_seed():
    first, second = (copies(LABELS, 0.5, seed) for seed in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(np.bincount(LABELS, first), np.bincount(LABELS, second))


def test_a_balanced_source_holds_every_example(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.zeros((101, 2, 2, 1), np.uint8), label=LABELS)
    source = open_source({"source": "npz", "name": str(tmp_path / "a.npz")})
    assert balanced(source, 0.0, 0) is source
    even = balanced(source, 1.0, 0)
    assert class_counts(source) == (60, 30, 11)
    assert class_counts(even) == (60, 60, 60)
    assert len(even) == 180
    rows = np.arange(180)
    np.testing.assert_array_equal(even.fetch(rows)["label"], even.labels)
    assert len({even.describe(row) for row in rows}) == 101
    source.blocks = BlockShuffle((61, 40))
    assert balanced(source, 1.0, 0).blocks.lengths == (62, 118)
    with pytest.raises(UserError, match=r"balance=0.5: this source does not know its labels"):
        balanced(open_source({"source": "fake", "name": "x", "num_examples": 4}), 0.5, 0)
