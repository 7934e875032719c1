"""Checksums of arrays, computed on the devices that hold their shards."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.types import Array


def checksums(arrays: Mapping[str, Array]) -> dict[str, int]:
    """Returns the checksum of every array, equal on any mesh and for any number of processes."""
    sums = jax.device_get(_all_checksums(dict(arrays)))
    return {name: int(np.asarray(value)) for name, value in sums.items()}


@jax.jit
def _all_checksums(arrays: Mapping[str, Array]) -> dict[str, Array]:
    # One program, because each of many programs would wait for all devices in turn.
    return {name: checksum(x) for name, x in arrays.items()}


def checksum(x: Array) -> Array:
    """Returns a uint32: the sum modulo 2^32 of each element's bits times an odd weight.

    The weight depends on the position of the element. Integer sums do not depend on their order, so
    that the value is the same on any mesh. An odd weight is invertible, so that every change of a
    single element is found; about one in 2^32 of all other changes is not.
    """
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, width)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size) + along
    mixed = (position ^ (position >> 15)) * jnp.uint32(0x2C1B3C6D)
    weight = ((mixed ^ (mixed >> 12)) * jnp.uint32(0x297A2D39)) | jnp.uint32(1)
    weighted = bits.astype(jnp.uint32) * weight
    if x.ndim > 1:
        # Row by row, because XLA's CPU code for one sum over everything takes twice as long. The
        # barrier keeps XLA from joining the two sums into one.
        rows = jnp.sum(weighted, axis=-1, dtype=jnp.uint32)
        weighted = jax.lax.optimization_barrier(rows)
    return jnp.sum(weighted, dtype=jnp.uint32)
