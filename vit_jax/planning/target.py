"""Devices to plan for: a TPU topology by name, virtual CPUs, or the devices of this machine."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from vit_jax.errors import UserError, first_line, nearest
from vit_jax.parallel import accelerators

# Compiling needs neither a TPU nor its cloud, but libtpu searches for both by default.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
EXAMPLES = "write such as v5e:16x16, v5p-512, tpu7x:4x4x4, cpu:8, or leave it out for what is here"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
      chip: the chip of each device; None for CPUs and unknown devices.
    """

    name: str
    devices: Sequence[jax.Device]
    num_slices: int
    chip: accelerators.Chip | None

    @property
    def num_chips(self) -> int:
        return len(self.devices) // (self.chip.devices if self.chip else 1)

    @property
    def num_hosts(self) -> int:
        return len({device.process_index for device in self.devices})

    @property
    def sides(self) -> tuple[int, ...]:
        """Returns the number of chips along each side of a TPU slice; () for other devices."""
        if self.platform != "tpu":
            return ()
        places = zip(*(device.coords for device in self.devices), strict=True)
        return tuple(len(set(places_along)) for places_along in places)

    @property
    def platform(self) -> str:
        return self.devices[0].platform

    @classmethod
    def find(cls, topology: str = "", num_slices: int = 1) -> "Target":
        """Returns the target of `--topology` and `--slices`; "" means this machine's devices.

        This method selects the backends that JAX starts, so it must be called before JAX computes
        anything.

        Raises:
          UserError: there is no such topology, or a package for compiling is not installed.
        """
        if num_slices < 1:
            raise UserError(f"plan: --slices={num_slices}: write a number from 1 up")
        if topology.startswith("cpu"):
            devices = _virtual_cpus(topology)
        elif topology in ("", "gpu", "cuda"):
            devices = _present(topology)
        else:
            generation, shape = parse_tpu(topology)
            devices = _tpu_devices(generation, shape, num_slices)
            return cls(f"{generation}:{shape}", devices, num_slices, accelerators.CHIPS[generation])
        if num_slices > 1:
            raise UserError(f"plan: --slices={num_slices} needs a TPU --topology, not {topology!r}")
        chip = accelerators.of_kind(devices[0].device_kind)
        return cls(topology or devices[0].device_kind, devices, 1, chip)


def parse_tpu(topology: str) -> tuple[str, str]:
    """Returns (generation, shape) of `v5e:16x16`, or of a type of Cloud TPU such as `v5p-512`."""
    try:
        found = accelerators.parse_slice(topology)
    except UserError as error:
        raise UserError(f"plan: --topology={error}") from None
    if found:
        return found.generation, found.shape
    match = re.fullmatch(r"([a-z]*\d+[a-z]*)(?::[\dx]+|-\d+)", topology)
    if not match:
        raise UserError(f"plan: --topology={topology!r} is not understood; {EXAMPLES}")
    raise UserError(
        f"plan: --topology={topology!r}: no TPU {match[1]!r};"
        f" {nearest(match[1], accelerators.TPUS)}"
    )


def _tpu_devices(generation: str, shape: str, num_slices: int) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"plan: --topology={generation}:{shape} needs the TPU compiler, which runs without a"
            " TPU on Linux x86-64: install the extra 'tpu' of vit-jax, or pip install 'jax[tpu]'"
        )
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Without this JAX would search for a TPU to compute on.
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options: dict[str, Any] = {**accelerators.TPUS[generation].topology_options}
    # By default libtpu's hosts have 2x2 chips.
    if accelerators.Slice(generation, shape).hosts == 1:
        options["chips_per_host_bounds"] = tuple(int(side) for side in f"{shape}x1".split("x"))[:3]
    try:
        description = topologies.get_topology_desc(
            f"{generation}:{shape}", platform="tpu", num_slices=num_slices, **options
        )
    except Exception as error:
        raise UserError(f"plan: --topology={generation}:{shape}: {first_line(error)}") from error
    return description.devices


def _virtual_cpus(topology: str) -> Sequence[jax.Device]:
    match = re.fullmatch(r"cpu(?::([1-9]\d{0,8}))?", topology)
    if not match:
        raise UserError(f"plan: --topology={topology!r} is not understood; write such as cpu:8")
    wanted = int(match[1] or 1)
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX raises this after it has started its devices.
        jax.config.update("jax_num_cpu_devices", wanted)
    devices = jax.devices("cpu")
    if len(devices) < wanted:
        raise UserError(
            f"plan: --topology={topology}: this process has {len(devices)} virtual CPU devices;"
            f" run with XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
        )
    return devices[:wanted]


def _present(topology: str) -> Sequence[jax.Device]:
    devices = jax.devices()
    if topology and devices[0].platform != "gpu":
        raise UserError(
            f"plan: --topology={topology}: JAX sees no GPU here, only {devices[0].platform};"
            " install the extra 'cuda' of vit-jax, or pip install 'jax[cuda12]'"
        )
    return devices
