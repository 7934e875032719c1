"""Samples of large arrays: what they look at, and that a wrong number is found."""

import numpy as np
import pytest
import sampled


@pytest.fixture
def array():
    return np.random.default_rng(0).normal(size=(128, 4, 16)).astype(np.float32)


@pytest.fixture
def stored(tmp_path, array):
    small = np.arange(6, dtype=np.float32).reshape(2, 3)
    labels = np.arange(20_000)
    np.savez(tmp_path / "a.npz", **sampled.thin({"a/b": array, "small": small, "labels": labels}))
    return sampled.load(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", [(128, 4, 16), (64, 128), (16, 16, 3, 48), (1, 1009)])
def test_every_index_of_every_axis_is_visited(shape):
    indices = np.indices(shape, dtype=np.float32)
    picked = [sampled.pick(index) for index in indices]
    assert 100 < len(picked[0]) <= 500
    assert [len(np.unique(p)) for p in picked] == [min(n, len(picked[0])) for n in shape]


def test_small_arrays_and_integers_stay_whole(stored):
    assert stored["small"].shape == (2, 3)
    assert stored["labels"].shape == (20_000,)
    assert stored.keys() == {"a/b", "small", "labels"}


def test_the_array_itself_passes(array, stored):
    sampled.assert_close(array, stored["a/b"])


@pytest.mark.parametrize("place", [0, 1])
def test_one_wrong_element_is_found(array, stored, place):
    """The first is in the sample; the second is not, and shows in the norm if it is far off."""
    array.reshape(-1)[place] += 10.0 if place else 0.1
    with pytest.raises(AssertionError, match="norm" if place else "Mismatch"):
        sampled.assert_close(array, stored["a/b"], atol=1e-5)


def test_the_tolerance_of_the_norm_is_that_of_the_elements(array, stored):
    sampled.assert_close(array + 0.9e-3, stored["a/b"], atol=1e-3)
    sampled.assert_close(array * 1.009, stored["a/b"], rtol=1e-2)
    with pytest.raises(AssertionError):
        sampled.assert_close(array * 1.011, stored["a/b"], rtol=1e-2)


def test_another_shape_or_order_is_found(array, stored):
    with pytest.raises(AssertionError):
        sampled.assert_close(array.transpose(1, 0, 2), stored["a/b"], atol=1e-5)
    with pytest.raises(AssertionError):
        sampled.assert_close(array[:-1], stored["a/b"], atol=1e-5)
