"""Inputs that a file keeps as draws: the same bits come back, and others are refused."""

import dataclasses
import zlib

import numpy as np
import pytest
import redrawn
import sampled


def draw(array, **fields):
    """The draw of `array`: the first numbers of a generator, if `fields` say no other."""
    draw = redrawn.Draw("default_rng", 3, "random", ((0, array.size),), "float64", 2.0, -1.0, (), 0)
    return dataclasses.replace(draw, shape=array.shape, crc32=zlib.crc32(array), **fields)


@pytest.fixture
def uniform():
    return np.random.default_rng(3).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("generator", redrawn.GENERATORS)
@pytest.mark.parametrize("rounding", ["float64", "float32", "divided"])
def test_normal_numbers_come_back_bit_for_bit(generator, rounding):
    normal = redrawn.GENERATORS[generator](5).standard_normal(1000)[100:400].reshape(30, 10)
    rounded, scale = normal.astype(np.float32), np.float32(7**0.5)
    array = {
        "float64": (1 + 7**0.5 * normal).astype(np.float32),
        "float32": rounded * scale + np.float32(1),
        "divided": rounded / scale + np.float32(1),
    }[rounding]
    fields = {"generator": generator, "seed": 5, "method": "standard_normal"}
    fields |= {"pieces": ((100, 300),), "rounding": rounding, "scale": 7**0.5, "shift": 1.0}
    assert draw(array, **fields).array().tobytes() == array.tobytes()


def test_an_array_of_several_pieces_comes_back(uniform):
    cut = np.concatenate([uniform.ravel()[:10], uniform.ravel()[50:90]])
    np.testing.assert_array_equal(draw(cut, pieces=((0, 10), (50, 40))).array(), cut)


def test_a_file_gives_draws_beside_stored_arrays(tmp_path, uniform):
    stored = sampled.thin({"labels": np.arange(4), "large": np.ones(2000, np.float32)})
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **stored, **{redrawn.ENTRY: redrawn.entry({"images": draw(uniform)})})
    found = sampled.load(path)
    assert found.keys() == {"labels", "large", "images"}
    assert found["images"].dtype == uniform.dtype
    np.testing.assert_array_equal(found["images"], uniform)


def test_other_numbers_than_the_recorded_ones_are_refused(uniform):
    other = dataclasses.replace(draw(uniform), seed=4)
    with pytest.raises(ValueError, match="draws other numbers"):
        other.array()
