"""The mesh, the map from logical to mesh axes, and the placement of batches on devices.

Models name the logical axes of their parameters and activations ("embed", "heads", "mlp", ...);
`RULES` is the only place that maps each of them to the mesh axis that it is split over.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.types import Array, ArraySpec, HostBatch

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # Order matters: a mesh axis goes to the first logical axis of an array that names it, so the
    # batch of an activation gets "fsdp" before its embed. A parameter with an axis for "fsdp" may
    # be split along another of its axes; see `_split_further`.
    ("batch", BATCH_AXES),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("token_mixing", "tensor"),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    # Convolutions are split along their outputs, over which weight standardization takes no mean.
    # Their channels are not split over `tensor`, because every convolution would gather its input.
    ("conv_out", "fsdp"),
    ("conv_in", None),
    ("conv_h", None),
    ("conv_w", None),
    ("patch_h", None),
    ("patch_w", None),
    ("channels", None),
    ("layers", None),
    ("tokens", None),
    ("head_dim", None),
    ("classes", None),
)

MIN_SPLIT = 2**16
"""A smaller parameter (in elements) stays whole if its own axis for `fsdp` cannot be split."""

_TILE_ROWS = 16
"""The number of rows of a bfloat16 tile in the memory of a TPU."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the axes `data`, `fsdp`, `tensor` in that order.

    One size may be -1, which stands for the number of devices that the other axes leave. If the
    devices belong to several slices, which only a data center's network connects, `data` alone
    spans them, because it sends the least, once per step.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` to that of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: sizes[axis] for axis in AXES}
    shape = list(sizes.values())
    fixed = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1:
        raise UserError(f"config.mesh has more than one -1: {sizes}")
    if -1 in shape and len(devices) % fixed == 0:
        shape[shape.index(-1)] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        raise UserError(
            f"config.mesh {sizes} does not fit {len(devices)} devices; the sizes must"
            " multiply to that number (-1 stands for the rest)"
        )
    num_slices = len({getattr(device, "slice_index", None) for device in devices})
    if shape[0] % num_slices:
        raise UserError(
            f"config.mesh.data={shape[0]} does not divide into {num_slices} slices, and only data"
            f" may span them; write a multiple of {num_slices}"
        )
    # The type is Auto, because Linen's backward pass does not trace under the default (Explicit).
    auto = (AxisType.Auto,) * len(AXES)
    inside = (shape[0] // num_slices, *shape[1:])
    if num_slices == 1:
        grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (num_slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=auto)


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """Makes a mesh that splits only batches; every device holds all parameters."""
    return make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, devices)


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
    """Makes the models' logical constraints resolve against `mesh` while tracing."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns a sharding of rows over `data` and `fsdp`; devices along `tensor` have equal rows."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a full copy on every device."""
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
    """Returns the sharding of every parameter, from the logical axis names that it carries.

    boxed: the (abstract) parameters as `init` returns them, in `nn.LogicallyPartitioned` boxes.
    A dimension that its mesh axis does not divide stays whole. `RULES` and the size of a parameter
    determine whether it is split over `fsdp`. The dimension is chosen such that the sums of
    gradients can be scattered. Parameters without names, as plain Linen modules have them, are
    replicated.

    Raises:
      ValueError: a parameter has a name that is not in `RULES` (an error of the model, not of the
        user).
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        if not _is_box(leaf):
            return replicated(mesh)
        unknown = set(leaf.names) - {name for name, _ in RULES} - {None}
        if unknown:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)}: sharding.RULES has no rule for the"
                f" logical axes {sorted(unknown)}"
            )
        shape = leaf.value.shape
        axes = nn.logical_to_mesh_axes(leaf.names, RULES)
        assert axes is not None
        spec = _divisible(axes, shape, mesh)
        if "fsdp" in spec or math.prod(shape) >= MIN_SPLIT:
            others = P(*(None if entry == "fsdp" else entry for entry in spec))
            spec = _split_further(others, leaf.names, shape, mesh, "fsdp")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=_is_box)


def unnamed(boxed: Any) -> list[str]:
    """Returns the paths of the parameters that name no logical axes, and so are replicated."""
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=_is_box)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in leaves
        if not _is_box(leaf)
    ]


def optimizer_shardings(boxed: Any, params: Any, mesh: Mesh) -> Any:
    """Returns shardings of copies of the parameters that are split over `data` too (ZeRO stage 1).

    params: the shardings of the parameters, as `param_shardings` returns them. The optimizer's
    state, the average and the gradients then need 1/data of the memory on each device, and a step
    sends no more. The sum of the gradients is scattered and the new parameters are gathered, where
    otherwise the whole sum is sent (Rajbhandari et al. 2020, "ZeRO", section 7.2.1).
    """

    def sharding(leaf: Any, own: NamedSharding) -> NamedSharding:
        if not _is_box(leaf):
            return own
        spec = _split_further(own.spec, leaf.names, leaf.value.shape, mesh, "data")
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, boxed, params, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _divisible(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    return P(
        *(
            axes if size % _ways(axes, mesh) == 0 else None
            for axes, size in zip(spec, shape, strict=True)
        )
    )


def _ways(axes: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    """Returns the number of devices over which an entry of a `PartitionSpec` splits."""
    return math.prod(mesh.shape[name] for name in _axis_names(axes))


def _axis_names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)


def _split_further(
    spec: P, names: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh, axis: str
) -> P:
    """Returns `spec` with one more dimension split over `axis`, if possible and necessary.

    For TPUs XLA scatters the sum of a gradient along outer dimensions and the rows of tiles; along
    the lanes of tiles it often sends the whole sum. The layout of an attention kernel has heads as
    the outer dimension, the width of a head as rows and `embed` along the lanes. Other kernels have
    their inputs as rows. The axis of layers is never split, because the loop over layers takes one
    slice at a time.
    """
    if mesh.shape[axis] == 1 or any(axis in _axis_names(axes) for axes in spec):
        return spec

    def preference(i: int) -> tuple[int, int]:
        if names[i] == "heads":
            return 0, i
        if names[i] == "head_dim" and shape[i] % (_TILE_ROWS * mesh.shape[axis]) == 0:
            return 1, i
        if names[i] in ("embed", "mlp", "token_mixing"):
            return 2, i
        return 3, -i

    for i in sorted(range(len(shape)), key=preference):
        if names[i] == "layers":
            continue
        axes = (*_axis_names(spec[i]), axis)
        if shape[i] % _ways(axes, mesh) == 0:
            # A name and a tuple with only that name are equivalent; the name is more readable.
            entry = axes if len(axes) > 1 else axis
            return P(*spec[:i], entry, *spec[i + 1 :])
    return spec


def shardings_like(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Returns shardings for a tree with copies of the parameters' tree (optimizer state, averages).

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
    """Returns the shapes and shardings of a global batch of examples of the given `spec`."""
    where = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape), array.dtype, sharding=where)
        for name, array in spec.items()
    }


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that this process's devices hold, ascending."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in places.values()]))


def place(batch: HostBatch, rows: np.ndarray, mesh: Mesh, batch_size: int) -> dict[str, Array]:
    """Places local rows of a batch as arrays over the whole mesh.

    batch: arrays with leading axis `len(rows)`; `rows` as `local_rows` gave them.
    """
    sharding = batch_sharding(mesh)

    def put(local: np.ndarray) -> Array:
        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, piece)

    return {name: put(array) for name, array in batch.items()}


def place_whole(array: Any, like: jax.ShapeDtypeStruct) -> Array:
    """Shards an array that every process can read whole; each device gets its part.

    array: one of NumPy, or one that stays in a file until it is sliced. Parts are taken out of it
      one after another, and on a host with several devices none but the last is held.
    """
    shape, places = tuple(array.shape), like.sharding
    devices: dict[str, list[jax.Device]] = {}
    parts = places.addressable_devices_indices_map(shape)
    for device, index in parts.items():
        devices.setdefault(str(index), []).append(device)
    placed = []
    for same in devices.values():
        part = np.asarray(array[parts[same[0]]], like.dtype)
        placed += [jax.device_put(part, device) for device in same]
    return jax.make_array_from_single_device_arrays(shape, places, placed)


class Placement(NamedTuple):
    """The placement of one array of a state, and its bytes on each device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int


def placements(tree: Any) -> list[Placement]:
    """Returns a row for every array, abstract or not, of a tree, in the tree's order."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        held = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        sizes = leaf.sharding.mesh.shape
        entries = [
            "×".join(name for name in _axis_names(axes) if sizes[name] > 1) or "-"
            for axes in leaf.sharding.spec
        ]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append(Placement(name, leaf.shape, leaf.dtype.name, " ".join(entries) or "-", held))
    return rows


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree that one device holds."""
    return sum(row.bytes_per_device for row in placements(tree))


def table(rows: Sequence[Placement]) -> str:
    """Returns placements as text: path, shape, mesh axes of each dimension, bytes per device."""
    cells = [
        (row.path, "×".join(map(str, row.shape)) or "scalar", row.spec, f"{row.bytes_per_device:,}")
        for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in cells
    )


def moved(tree: Any, shardings: Any) -> Any:
    """Returns arrays over the whole mesh with the given shardings; copies only what must move."""
    in_place = jax.tree.map(
        lambda array, wanted: array.sharding.is_equivalent_to(wanted, array.ndim), tree, shardings
    )
    if all(jax.tree.leaves(in_place)):
        return tree
    return jax.jit(lambda arrays: arrays, out_shardings=shardings)(tree)
