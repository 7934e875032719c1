"""Options for XLA's TPU compiler, by generation: what overlaps communication with computation.

They go to the compiler with each program, where an unknown name is an error; in the environment
(`LIBTPU_INIT_ARGS`) it would be one only on a TPU. The sets are those that MaxText trains with
(github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py and configs/tpu).
"""

from collections.abc import Mapping

from jax.sharding import Mesh

from vit_jax.parallel import accelerators

_ASYNC_COLLECTIVES = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# For v5e alone. libtpu 0.0.52 refuses it elsewhere: "incorrect results, hang, SDC" might follow.
# The pinned one takes it, and MaxText sets it for v5p and v6e, where without it next to no gather
# runs beside computation.
_FUSED_GATHERS = {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": True}
# For parameters split over `fsdp`.
_SHARDED_PARAMETERS = {
    # A product with a kernel that is split along its inputs is else done piece by piece, while the
    # pieces travel in a ring, each adding to the whole result in memory. ViT-B/16 with 128 images
    # a chip on v5e:4x4, fsdp 16, remat full: 68 GB are written a step with it, 26 without.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    # Sums that are combined into one are not scattered, and so send twice as much. This combines
    # norms and biases, and leaves kernels alone.
    "xla_jf_crs_combiner_threshold_in_bytes": 65_536,
}
_DATA_PARALLEL = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}

TPU: Mapping[str, Mapping[str, bool | int | str]] = {
    "v2": {**_SHARDED_PARAMETERS},
    "v3": {**_SHARDED_PARAMETERS},
    "v4": {**_SHARDED_PARAMETERS, **_DATA_PARALLEL, **_ASYNC_COLLECTIVES},
    "v5e": {**_SHARDED_PARAMETERS, **_DATA_PARALLEL, **_ASYNC_COLLECTIVES, **_FUSED_GATHERS},
    "v5p": {
        **_SHARDED_PARAMETERS,
        **_DATA_PARALLEL,
        **_ASYNC_COLLECTIVES,
        "xla_tpu_megacore_fusion_allow_ags": False,
        "xla_enable_async_collective_permute": True,
        "xla_tpu_enable_ag_backward_pipelining": True,
    },
    # KiB of the vector memory that one fusion may plan with, of 128 MiB.
    "v6e": {
        **_SHARDED_PARAMETERS,
        **_ASYNC_COLLECTIVES,
        "xla_tpu_scoped_vmem_limit_kib": 98304,
    },
    # Of 64 MiB a core. Gathers and reductions run on its SparseCores by default.
    "tpu7x": {**_SHARDED_PARAMETERS, "xla_tpu_scoped_vmem_limit_kib": 65536},
}


def for_mesh(mesh: Mesh) -> dict[str, bool | int | str]:
    """The options for a program over `mesh`; none on other platforms than TPUs."""
    device = mesh.devices.flat[0]
    chip = accelerators.of_kind(device.device_kind)
    if chip is None:
        return {}
    options = dict(TPU.get(chip.name, {}))
    slices = {getattr(device, "slice_index", None) for device in mesh.devices.flat}
    if len(slices) > 1 and options:
        options |= _DATA_PARALLEL
    return options
