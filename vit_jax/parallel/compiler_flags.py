"""Options for XLA's compiler, chosen by the devices that a program is for.

The options of each TPU generation are in `accelerators`. They go to the compiler with each program,
where an unknown name is an error; in the environment (`LIBTPU_INIT_ARGS`) an unknown name would be
an error only on a TPU.
"""

from typing import Any

from jax.sharding import Mesh

from vit_jax.parallel import accelerators


def for_mesh(mesh: Mesh) -> dict[str, Any]:
    """Returns the options for a program over `mesh`; none on other platforms than TPUs."""
    chip = accelerators.of_kind(mesh.devices.flat[0].device_kind)
    if chip is None or chip.tpu is None:
        return {}
    options = dict(chip.tpu.compiler_options)
    slices = {getattr(device, "slice_index", None) for device in mesh.devices.flat}
    if len(slices) > 1:
        options |= accelerators.DATA_PARALLEL
    return options
