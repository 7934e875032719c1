"""`python -m vit_jax.launch.measure [--workdir=DIR] [--host=NAME]` measures the host it runs on.

All hosts of a run start it at the same time. Each prints what it finds in the order of what it
needs: first what is installed, then its own chips, last the all-reduce over all chips. A host or a
chip that holds the others up is thus known by the line that is missing.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import time
from collections.abc import Sequence
from typing import Any

from vit_jax import version
from vit_jax.errors import first_line
from vit_jax.launch.health import MARK

SIDE, CPU_SIDE = 4096, 128
"""The side of the square matrices that each chip, or each CPU, multiplies, in bfloat16."""

PRODUCTS = 20
REDUCED_BYTES, CPU_REDUCED_BYTES = 64 << 20, 64 << 10
"""The bytes that each chip, or each CPU, brings to the all-reduce."""

FILE_BYTES = 64 << 20


def versions() -> dict[str, str]:
    """Returns the versions that have to be equal on all hosts."""
    found = {
        "python": platform.python_version(),
        "vit_jax": version.current_commit() or version.__version__,
    }
    for name in ("jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def storage_rates(workdir: str, size: int = FILE_BYTES) -> dict[str, float]:
    """Returns the megabytes per second that one host writes to and reads from a folder."""
    from vit_jax.storage import literal

    data = os.urandom(size)
    file = literal(workdir) / f"check-{socket.gethostname()}-{os.getpid()}"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        started = time.perf_counter()
        file.write_bytes(data)
        written = time.perf_counter()
        is_same = file.read_bytes() == data
        read = time.perf_counter()
    finally:
        file.unlink(missing_ok=True)
    if not is_same:
        raise OSError(f"{file} was read otherwise than it was written")
    return {"write": size / 1e6 / (written - started), "read": size / 1e6 / (read - written)}


def chips(products: int = PRODUCTS) -> list[dict[str, Any]]:
    """Returns the kind, speed and correctness of each device of this host."""
    import jax
    import jax.numpy as jnp

    side = CPU_SIDE if jax.default_backend() == "cpu" else SIDE

    @jax.jit
    def multiply(a: jax.Array) -> jax.Array:
        # Every entry of a product of `a` with itself is `side` times its own square, which the
        # scale takes back, so that the values stay as they are.
        return jax.lax.fori_loop(0, products, lambda _, b: (b @ a) * (1 / side), a)

    found = []
    for device in jax.local_devices():
        ones = jax.device_put(jnp.ones((side, side), jnp.bfloat16), device)
        multiply(ones).block_until_ready()
        started = time.perf_counter()
        product = multiply(ones).block_until_ready()
        seconds = time.perf_counter() - started
        found.append(
            {
                "kind": device.device_kind,
                "tflops": 2 * side**3 * products / seconds / 1e12,
                "right": bool(jnp.all(product == 1)),
            }
        )
    return found


def all_reduce() -> dict[str, Any]:
    """Returns the speed and correctness of a sum over all devices of all hosts."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    size = CPU_REDUCED_BYTES if jax.default_backend() == "cpu" else REDUCED_BYTES
    mesh = Mesh(np.array(jax.devices()), ("all",))
    split, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    count = mesh.size

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return np.full((1, size // 4), 1 + (index[0].start or 0), np.float32)

    values = jax.make_array_from_callback((count, size // 4), split, part)
    add = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole)
    add(values).block_until_ready()
    started = time.perf_counter()
    total = add(values).block_until_ready()
    seconds = time.perf_counter() - started
    wanted = count * (count + 1) // 2
    right = bool((np.asarray(total.addressable_data(0)) == wanted).all())
    return {"devices": count, "gb_per_s": size / 1e9 / seconds, "right": right}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures this host; returns the exit code."""
    parser = argparse.ArgumentParser(prog="measure")
    parser.add_argument("--workdir", default="")
    parser.add_argument("--host", default=socket.gethostname())
    arguments = parser.parse_args(argv)

    def tell(**found: Any) -> None:
        print(f"{MARK}{json.dumps({'host': arguments.host, **found})}", flush=True)

    tell(versions=versions())
    if arguments.workdir:
        try:
            tell(storage=storage_rates(arguments.workdir))
        except Exception as error:  # Clients of object stores raise errors of their own.
            tell(error=f"{arguments.workdir}: {type(error).__name__}: {error}")
    from vit_jax.parallel import processes

    try:
        processes.setup("", "default")
        tell(chips=chips())
        tell(all_reduce=all_reduce())
    except Exception as error:  # Whatever a broken chip raises is for the table.
        tell(error=f"{type(error).__name__}: {first_line(error)}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
