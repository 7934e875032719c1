"""Describes this machine, and measures the rate of its matrix products."""

import os
import statistics
import time

import jax
import jax.numpy as jnp

MATMUL_SIZE = {"cpu": 1536, "gpu": 8192, "tpu": 8192}
"""Side of the square product that stands for a platform's limit."""


def matmul_rate(dtype: jnp.dtype = jnp.float32, repeats: int = 5) -> float:
    """Returns FLOP/s of a square matrix product on the first device, the limit of a step."""
    size = MATMUL_SIZE[jax.default_backend()]
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
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
