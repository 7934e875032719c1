"""Small states that tests save and restore."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.parallel import sharding

METADATA = {"seconds": {"train": 1.5}, "owes_evaluation": False}


def mesh_of(data, fsdp):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": 1})


def tree(mesh, factor=1.0):
    """Arrays of several dtypes and placings, as a state has them."""
    where = NamedSharding(mesh, P("fsdp"))
    return {
        "step": jax.device_put(jnp.int32(7), sharding.replicated(mesh)),
        "params": {"w": jax.device_put(factor * jnp.arange(64.0).reshape(16, 4), where)},
        "opt": {"mu": jax.device_put(jnp.ones((16, 4), jnp.bfloat16) * 0.1, where)},
    }


def abstract(like):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


def data_files(directory, step):
    files = [path for path in (directory / str(step)).rglob("*") if path.is_file()]
    return sorted(path for path in files if path.stat().st_size)
