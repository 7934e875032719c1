"""Describes this machine, and measures the rate of its matrix products."""

import os
import statistics
import time

import jax
import jax.numpy as jnp

MATMULS = {"cpu": (1536, 1), "gpu": (8192, 10), "tpu": (8192, 10)}
"""The side of the square product that stands for a platform's limit, and the products in a row.

A product takes an accelerator about a millisecond, so waiting after each one would count as well.
"""


def matmul_rate(dtype: jnp.dtype = jnp.float32, repeats: int = 5) -> float:
    """Returns FLOP/s of a square matrix product on the first device, the limit of a step.

    The numbers are random, because a GPU multiplies constants faster: they take less power.
    """
    size, in_a_row = MATMULS[jax.default_backend()]
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready([product(x, x) for _ in range(in_a_row)])
        seconds.append((time.perf_counter() - started) / in_a_row)
    return 2 * size**3 / statistics.median(seconds)


def describe_machine() -> dict[str, str | int]:
    """Returns a description of the machine that figures were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "host_cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }
