"""The mesh, the map from logical to mesh axes, and the placing of batches on devices.

Models name the logical axes of their parameters and activations ("embed", "heads", "mlp", ...);
`RULES` is the only place that says which mesh axis each of them is split over.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.types import Array, ArraySpec, Batch

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # Order matters: a mesh axis goes to the first logical axis of an array that asks for it, so an
    # activation's batch takes "fsdp" before its embed can, while a parameter's embed gets it.
    ("batch", BATCH_AXES),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("layers", None),
    ("tokens", None),
    ("head_dim", None),
    ("classes", None),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `tensor` in that order.

    One size may be -1: the devices that the other axes leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    fixed = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1:
        raise UserError(f"config.mesh has more than one -1: {dict(sizes)}")
    if -1 in shape and len(devices) % fixed == 0:
        shape[shape.index(-1)] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        raise UserError(
            f"config.mesh {dict(sizes)} does not fit {len(devices)} devices; the sizes must"
            " multiply to that number (-1 stands for the rest)"
        )
    # Auto, because under today's default (Explicit) Linen's backward pass does not trace.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
    """Makes the models' logical constraints resolve against `mesh` while tracing."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; the copies along `tensor` work on the same rows."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def check_batch_size(mesh: Mesh, batch_size: int, accum_steps: int = 1) -> None:
    """Raises a `UserError` unless every device gets the same number of rows of a micro-batch."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES) * accum_steps
    if batch_size % ways:
        lower = batch_size // ways * ways
        raise UserError(
            f"config.batch_size={batch_size} is not divisible by {ways}"
            f" (mesh data × fsdp × accum_steps); write {lower or ways} or {lower + ways}"
        )


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Sharding of every parameter, from the logical axis names it carries.

    boxed: the (abstract) parameters as `init` returns them, in `nn.LogicallyPartitioned` boxes.
    A dimension that its mesh axis does not divide stays whole.

    Raises:
      ValueError: a parameter without logical axes (a fault of the model, not of the user).
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise ValueError(f"parameter {jax.tree_util.keystr(path)} names no logical axes")
        spec = nn.logical_to_mesh_axes(leaf.names, RULES)
        return NamedSharding(mesh, _divisible(spec, leaf.value.shape, mesh))

    return jax.tree_util.tree_map_with_path(
        sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def _divisible(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    def fits(axes: Any, size: int) -> bool:
        names = axes if isinstance(axes, tuple) else (axes,)
        return axes is None or size % math.prod(mesh.shape[name] for name in names) == 0

    return P(*(axes if fits(axes, size) else None for axes, size in zip(spec, shape, strict=True)))


def shardings_like(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameters' tree (optimizer state, averages).

    A leaf whose path ends in a parameter's path, and has its shape, is sharded like it; anything
    else (counters, factored moments) is replicated.
    """
    by_path = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            shape, like = by_path.get(names[start:], (None, None))
            if shape == leaf.shape:
                return like
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def abstract_batch(
    spec: Mapping[str, ArraySpec], mesh: Mesh, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and placing of a global batch of examples of the given `spec`."""
    where = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape), array.dtype, sharding=where)
        for name, array in spec.items()
    }


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, ascending."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in places.values()]))


def place(batch: Batch, rows: np.ndarray, mesh: Mesh, batch_size: int) -> dict[str, Array]:
    """Local rows of a batch → arrays over the whole mesh.

    batch: arrays with leading axis `len(rows)`; `rows` as `local_rows` gave them.
    """
    sharding = batch_sharding(mesh)

    def put(local: np.ndarray) -> Array:
        def piece(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, piece)

    return {name: put(array) for name, array in batch.items()}


def place_whole(array: np.ndarray, like: jax.ShapeDtypeStruct) -> Array:
    """An array that every process holds whole, as `like` shards it: each device takes its part."""
    array = np.asarray(array, like.dtype)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])
