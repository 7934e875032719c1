"""Checksums of arrays, computed on the devices that hold their shards, or on the host if small."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.types import Array

MOST_HOST_BYTES = 4 << 20
"""NumPy sums this much in milliseconds; the program of the devices takes seconds to compile."""


def checksums(arrays: Mapping[str, Array]) -> dict[str, int]:
    """Returns the checksum of every array, equal on any mesh and for any number of processes."""
    is_here = all(getattr(x, "is_fully_addressable", True) for x in arrays.values())
    if is_here and sum(x.nbytes for x in arrays.values()) <= MOST_HOST_BYTES:
        sums = {name: checksum(x) for name, x in jax.device_get(dict(arrays)).items()}
    else:
        sums = jax.device_get(_all_checksums(dict(arrays)))
    return {name: int(np.asarray(value)) for name, value in sums.items()}


@jax.jit
def _all_checksums(arrays: Mapping[str, Array]) -> dict[str, Array | np.ndarray]:
    # One program, because each of many programs would wait for all devices in turn.
    return {name: checksum(x) for name, x in arrays.items()}


def checksum(x: Array | np.ndarray) -> Array | np.ndarray:
    """Returns a uint32: the sum modulo 2^32 of each element's bits times an odd weight.

    The weight depends on the position of the element. Integer sums do not depend on their order, so
    that the value is the same on any mesh. An odd weight is invertible, so that every change of a
    single element is found; about one in 2^32 of all other changes is not.
    """
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[x.dtype.itemsize]
    bits = x.astype(np.uint8) if x.dtype == np.bool_ else x.view(width)
    position = _positions(bits)
    mixed = (position ^ (position >> 15)) * np.uint32(0x2C1B3C6D)
    weight = ((mixed ^ (mixed >> 12)) * np.uint32(0x297A2D39)) | np.uint32(1)
    weighted = bits.astype(np.uint32) * weight
    if x.ndim > 1 and isinstance(weighted, jax.Array):
        # Row by row, because XLA's CPU code for one sum over everything takes twice as long. The
        # barrier keeps XLA from joining the two sums into one.
        rows = jnp.sum(weighted, axis=-1, dtype=np.uint32)
        weighted = jax.lax.optimization_barrier(rows)
    return weighted.sum(dtype=np.uint32)


def _positions(x: Array | np.ndarray) -> Array | np.ndarray:
    """Returns the row-major position of each element of `x`, modulo 2^32."""
    if isinstance(x, np.ndarray):
        return np.arange(x.size, dtype=np.uint32).reshape(x.shape)
    position = jnp.zeros(x.shape, np.uint32)
    for axis, size in enumerate(x.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(np.uint32, x.shape, axis)
    return position
