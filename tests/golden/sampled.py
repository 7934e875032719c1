"""Large recorded arrays kept as every k-th element and the norm of the whole.

k is the smallest step that leaves at most `LIMIT` elements and shares no factor with the number of
elements: the sample then visits every index of every axis. An array of at most `LIMIT` elements is
stored whole. In a file, `name` holds the sample, flat, and `name@norm` the Euclidean norm.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import numpy as np
import redrawn

LIMIT = {np.dtype(np.float32): 500, np.dtype(np.uint8): 5000}


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is kept of an array: its picked elements, and the norm of all of them."""

    values: np.ndarray
    norm: float


def pick(array: np.ndarray) -> np.ndarray:
    """Every k-th element, flat."""
    step = -(-array.size // LIMIT[array.dtype])
    while math.gcd(step, array.size) > 1:
        step += 1
    return array.reshape(-1)[::step]


def norm(array: np.ndarray) -> float:
    """Euclidean norm, summed in float64; exact for images of integers."""
    return float(np.sqrt(np.sum(np.square(array, dtype=np.float64))))


def thin(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays as a file stores them, samples in place of the large ones."""
    stored = {}
    for name, array in arrays.items():
        large = array.size > LIMIT.get(array.dtype, array.size)
        stored[name] = pick(array) if large else array
        if large:
            stored[f"{name}@norm"] = np.float64(norm(array))
    return stored


def load(path: pathlib.Path) -> dict[str, np.ndarray | Sample]:
    """The arrays of a file, a `Sample` in place of each one that was large."""
    with np.load(path, allow_pickle=False) as file:
        stored = redrawn.whole(file)
    return {
        name: Sample(array, float(stored[f"{name}@norm"])) if f"{name}@norm" in stored else array
        for name, array in stored.items()
        if not name.endswith("@norm")
    }


def values(array: np.ndarray | Sample) -> np.ndarray:
    """The elements that are there."""
    return array.values if isinstance(array, Sample) else array


def assert_close(actual, expected, *, rtol=0.0, atol=0.0, err_msg=""):
    """`np.testing.assert_allclose`; of a sample, for its elements and for the norm.

    The norm's tolerance is what the elements' own tolerances add up to.
    """
    if not isinstance(expected, Sample):
        np.testing.assert_allclose(actual, expected, rtol, atol, err_msg=err_msg)
        return
    actual = np.asarray(actual)
    np.testing.assert_allclose(pick(actual), expected.values, rtol, atol, err_msg=err_msg)
    np.testing.assert_allclose(
        norm(actual),
        expected.norm,
        rtol + 1e-12,
        atol * math.sqrt(actual.size),
        err_msg=f"norm of {err_msg}",
    )
