"""Checksums of arrays, computed where their shards are."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.types import Array


def checksums(arrays: Mapping[str, Array]) -> dict[str, int]:
    """The checksum of every array, on any mesh and over any number of processes."""
    sums = jax.device_get(_all_checksums(dict(arrays)))
    return {name: int(np.asarray(value)) for name, value in sums.items()}


@jax.jit
def _all_checksums(arrays: Mapping[str, Array]) -> dict[str, Array]:
    # One program: programs of their own would each wait for all devices in turn.
    return {name: checksum(x) for name, x in arrays.items()}


def checksum(x: Array) -> Array:
    """uint32: the sum, modulo 2^32, of each element's bits times an odd weight of its position.

    Integer sums do not depend on their order, so the value is the same on any mesh and is computed
    where the shards are. An odd weight is invertible, so no change of a single element is missed;
    of other changes, about one in 2^32 is.
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
        # Row by row: XLA's CPU code for a sum of everything at once takes twice as long, and it
        # would make the two sums one again.
        rows = jnp.sum(weighted, axis=-1, dtype=jnp.uint32)
        weighted = jax.lax.optimization_barrier(rows)
    return jnp.sum(weighted, dtype=jnp.uint32)
