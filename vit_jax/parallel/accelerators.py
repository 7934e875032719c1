"""Accelerators: one row for each generation of TPU and each GPU, with all facts about it.

TPU figures are from Google Cloud's page of each generation (docs.cloud.google.com/tpu/docs/v2 to
/v6e and /tpu7x, read 2026); those of v2 and v3 are from Jouppi et al. (2020), "A domain-specific
supercomputer for training deep neural networks", Table 3. GPU figures are from NVIDIA's data
sheets, for dense products, not for the doubled rates with structured sparsity.

Compiler options overlap communication with computation. The sets are those that MaxText trains with
(github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py and configs/tpu).

This module needs the standard library alone, because the launcher runs before anything is
installed.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from vit_jax.errors import UserError

GIB = 1 << 30

Options = dict[str, bool | int | str]

_ASYNC_COLLECTIVES: Options = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# These are for sharded parameters.
_SHARDED_PARAMETERS: Options = {
    # XLA would otherwise multiply with a kernel that is split along its inputs piece by piece,
    # while the pieces travel in a ring and each is added to the whole result in memory. ViT-B/16
    # with 128 images a chip on v5e:4x4, all sharded, remat full, writes 68 GB a step with that, and
    # 26 GB without.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    # XLA does not scatter sums that it has combined into one, so these send twice as much. This
    # threshold lets it combine norms and biases, and keeps kernels apart.
    "xla_jf_crs_combiner_threshold_in_bytes": 65_536,
}
DATA_PARALLEL: Options = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
"""Compiler options for gradients that are summed over many chips or over several slices."""

CUBE = 64
"""The chips of a cube, 4x4x4, of which larger slices of three-dimensional generations consist."""

_LONGEST_SIDE = 256
"""The most chips along a side of a slice that has a type (xpk, core/system_characteristics.py)."""


def _flat(*chips: int) -> Mapping[int, str]:
    """Returns the shapes of two-dimensional slices: a square, or two squares side by side."""
    shapes = {}
    for count in chips:
        short = 2 ** ((count.bit_length() - 1) // 2)
        shapes[count] = f"{short}x{count // short}"
    return shapes


def _cubes(*cubes: int) -> Mapping[int, str]:
    """Returns the shapes of three-dimensional slices up to a cube, and of these numbers of cubes.

    A number of cubes has the shape with the shortest sides, as in the tables of v4, v5p and tpu7x.
    """
    shapes = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"}
    for count in cubes:
        sides = [
            (first, second, count // first // second)
            for first in range(1, count + 1)
            if count % first == 0 and first**3 <= count
            for second in range(first, count // first + 1)
            if count // first % second == 0 and second <= count // first // second
        ]
        best = min(sides, key=sum)
        if 4 * best[-1] <= _LONGEST_SIDE:
            shapes[CUBE * count] = "x".join(str(4 * side) for side in best)
    return shapes


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Facts about a TPU generation: names on Cloud TPU, slice shapes, compiler options.

    Attributes:
      shapes: chips of a slice -> its shape, such as `4x4`, for every type that is published
        (docs.cloud.google.com/tpu/docs/v2 to /v6e and /tpu7x; for the many types of v5p and tpu7x
        github.com/AI-Hypercomputer/xpk, core/system_characteristics.py).
      cores_in_type: whether a type such as `v5p-8` counts TensorCores, two in a chip, not chips.
      type: the first part of the type by which Cloud TPU makes a slice, such as `v5litepod`.
      spellings: other names of the generation that people write.
      runtime: the software version that Cloud TPU installs on the hosts
        (docs.cloud.google.com/tpu/docs/runtimes); "" where its API does not serve the generation.
      compiler_options: options of XLA's TPU compiler.
      topology_options: options with which libtpu describes a slice as Cloud TPU runs it.
      machines: chips of a host -> the machine type of Compute Engine and GKE
        (docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus). Slices of one host have
        the machine with as many chips; hosts of larger slices have four.
      node_label: the value of `cloud.google.com/gke-tpu-accelerator` on nodes of GKE (same page).
      image: the image family of Compute Engine, in the project ubuntu-os-accelerator-images
        (docs.cloud.google.com/tpu/docs/tpu-os-images); "" where managed instance groups do not take
        the generation (docs.cloud.google.com/tpu/docs/tpus-and-migs).
      disk: the type of the boot disk, where the machines do not take the default one.
      placement_policy: whether GKE reads the topology of several hosts from a workload policy
        (docs.cloud.google.com/kubernetes-engine/docs/how-to/tpus).
    """

    shapes: Mapping[int, str]
    cores_in_type: bool
    type: str
    runtime: str
    compiler_options: Options
    spellings: tuple[str, ...] = ()
    topology_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    machines: Mapping[int, str] = dataclasses.field(default_factory=dict)
    node_label: str = ""
    image: str = ""
    disk: str = ""
    placement_policy: bool = False

    def hosts(self, chips: int) -> int:
        """Returns the number of hosts (TPU VMs) of a slice."""
        return 1 if chips in (1, 4, *self.machines) else chips // 4

    def machine(self, chips: int) -> str:
        """Returns the machine type of the hosts of a slice; "" where there is none."""
        return self.machines.get(chips // self.hosts(chips), "")


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peaks of one chip.

    Attributes:
      name: the name that `--topology` and the makers use.
      kind: a pattern for `jax.Device.device_kind`; the first matching row is used.
      devices: the number of JAX devices of one chip; each has an equal share of everything below.
      flops: the rate of bfloat16 matrix products, FLOP per second.
      hbm_bytes, hbm_bandwidth: memory, and bytes per second to and from it.
      link_bandwidth: bytes per second over all links of a chip to others (ICI, NVLink), both
        directions together.
      dcn_bandwidth: the chip's share of its host's network, bytes per second in one direction; 0
        where it is not published, or depends on the machine around the chip.
      tpu: facts about a TPU generation; None for GPUs.
    """

    name: str
    kind: str
    devices: int
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float = 0.0
    tpu: Tpu | None = None

    @property
    def flops_per_device(self) -> float:
        return self.flops / self.devices

    @property
    def hbm_bytes_per_device(self) -> int:
        return self.hbm_bytes // self.devices


_IMAGE = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
_V5E = (4, 8, 16, 32, 64, 128, 256)
_ROWS = (
    # v2 and v3 have four links of 496 and 656 Gbit/s, each in both directions.
    Chip(
        "v2", r"TPU v2", 2, 46e12, 16 * GIB, 700e9, 496e9,
        tpu=Tpu(
            _flat(4, 16, 64, 128, 256), True, "v2", "tpu-ubuntu2204-base", _SHARDED_PARAMETERS
        ),
    ),
    Chip(
        "v3", r"TPU v3", 2, 123e12, 32 * GIB, 900e9, 656e9,
        tpu=Tpu(
            _flat(4, 16, 32, 64, 128, 256, 512, 1024), True, "v3", "tpu-ubuntu2204-base",
            _SHARDED_PARAMETERS,
        ),
    ),
    # v4 has six links of 50 GB/s in each direction. Its two cores are one device on Cloud TPU.
    Chip(
        "v4", r"TPU v4(?! lite)", 1, 275e12, 32 * GIB, 1200e9, 600e9,
        tpu=Tpu(
            _cubes(1, 2, 4, 8, 12, 16, 32, 64), True, "v4", "tpu-ubuntu2204-base",
            _SHARDED_PARAMETERS | DATA_PARALLEL | _ASYNC_COLLECTIVES,
            topology_options={"chip_config_name": "megacore"},
            machines={4: "ct4p-hightpu-4t"},
            node_label="tpu-v4-podslice",
        ),
    ),
    Chip(
        "v5e", r"TPU v5 ?(lite|e)", 1, 197e12, 16 * GIB, 819e9, 400e9, 25e9 / 8,
        Tpu(
            _flat(1, *_V5E), False, "v5litepod", "v2-alpha-tpuv5-lite",
            # libtpu 0.0.52 refuses fused gathers on other generations, where "incorrect results,
            # hang, SDC" might follow. The pinned one takes them, and MaxText sets them for v5p and
            # v6e, where next to no gather runs beside computation without them.
            _SHARDED_PARAMETERS | DATA_PARALLEL | _ASYNC_COLLECTIVES
            | {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": True},
            spellings=("v5litepod", "v5lite"),
            machines={n: f"ct5lp-hightpu-{n}t" for n in (1, 4, 8)},
            node_label="tpu-v5-lite-podslice",
        ),
    ),
    Chip(
        "v5p", r"TPU v5p?$", 1, 459e12, 95 * GIB, 2765e9, 1200e9, 50e9 / 8,
        Tpu(
            _cubes(*range(1, 97)), True, "v5p", "v2-alpha-tpuv5",
            _SHARDED_PARAMETERS | DATA_PARALLEL | _ASYNC_COLLECTIVES
            | {
                "xla_tpu_megacore_fusion_allow_ags": False,
                "xla_enable_async_collective_permute": True,
                "xla_tpu_enable_ag_backward_pipelining": True,
            },
            machines={4: "ct5p-hightpu-4t"},
            node_label="tpu-v5p-slice",
            image=_IMAGE,
        ),
    ),
    # The limit is the KiB of vector memory, of 128 MiB, that one fusion may plan with.
    Chip(
        "v6e", r"TPU v6 ?(lite|e)", 1, 918e12, 32 * GIB, 1640e9, 800e9, 100e9 / 8,
        Tpu(
            _flat(1, *_V5E), False, "v6e", "v2-alpha-tpuv6e",
            _SHARDED_PARAMETERS | _ASYNC_COLLECTIVES
            | {"xla_tpu_scoped_vmem_limit_kib": 98304},
            spellings=("v6",),
            machines={n: f"ct6e-standard-{n}t" for n in (1, 4, 8)},
            node_label="tpu-v6e-slice",
            image=_IMAGE,
        ),
    ),
    # The limit is of 64 MiB for each core. Gathers and reductions run on SparseCores by default.
    # The Cloud TPU API does not serve this generation (docs.cloud.google.com/tpu/docs/tpu7x).
    Chip(
        "tpu7x", r"TPU ?7x", 2, 2307e12, 192 * GIB, 7380e9, 1200e9, 100e9 / 8,
        Tpu(
            {1: "1x1x1", **_cubes(*range(1, 97), 108, 128, 140, 144)}, True, "tpu7x", "",
            _SHARDED_PARAMETERS | {"xla_tpu_scoped_vmem_limit_kib": 65536},
            spellings=("v7x", "7x"),
            machines={n: f"tpu7x-standard-{n}t" for n in (1, 4)},
            node_label="tpu7x",
            image="ubuntu-accel-2404-amd64-tpu-tpu7x",
            disk="hyperdisk-balanced",
            placement_policy=True,
        ),
    ),
    Chip("a100-80gb", r".*\bA100.*80GB", 1, 312e12, 80 * 10**9, 2039e9, 600e9),
    Chip("a100-40gb", r".*\bA100", 1, 312e12, 40 * 10**9, 1555e9, 600e9),
    Chip("h100-pcie", r".*\bH100 PCIe", 1, 756e12, 80 * 10**9, 2000e9, 600e9),
    Chip("h100", r".*\bH100", 1, 989e12, 80 * 10**9, 3350e9, 900e9),
    Chip("h200", r".*\bH200", 1, 989e12, 141 * 10**9, 4800e9, 900e9),
    Chip("b200", r".*\bB200", 1, 2250e12, 180 * 10**9, 8000e9, 1800e9),
)  # fmt: skip

CHIPS = {chip.name: chip for chip in _ROWS}
TPUS = {chip.name: chip.tpu for chip in _ROWS if chip.tpu}


def of_kind(device_kind: str) -> Chip | None:
    """Returns the chip behind a JAX device; None for CPUs and for chips without a row."""
    return next((chip for chip in _ROWS if re.match(chip.kind, device_kind)), None)


def tpu_generation(name: str) -> str | None:
    """Returns the generation that a name or another spelling of it stands for; None if none."""
    return next((key for key, tpu in TPUS.items() if name in (key, *tpu.spellings)), None)


@dataclasses.dataclass(frozen=True)
class Slice:
    """One TPU slice: its generation, its shape in chips, such as `4x4`, and its hosts."""

    generation: str
    shape: str

    @property
    def tpu(self) -> Tpu:
        return TPUS[self.generation]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def hosts(self) -> int:
        return self.tpu.hosts(self.chips)

    @property
    def type(self) -> str:
        """Returns the accelerator type in Cloud TPU's spelling, such as `v5litepod-256`."""
        return f"{self.tpu.type}-{self.chips * (2 if self.tpu.cores_in_type else 1)}"


def parse_slice(text: str) -> Slice | None:
    """Returns the slice of `v5e:16x16`, or of a type such as `v5p-512`.

    The number in a type counts TensorCores, two in a chip, for all generations but v5e and v6e,
    where it counts chips.

    Returns:
      None if the text is of neither form, or names no generation.

    Raises:
      UserError: the generation has no type with this number, or no slice has this shape.
    """
    match = re.fullmatch(r"([a-z]*\d+[a-z]*)(?::(\d{1,9}(?:x\d{1,9})*)|-(\d{1,9}))", text)
    generation = tpu_generation(match[1]) if match else None
    if match is None or generation is None:
        return None
    tpu = TPUS[generation]
    if match[2]:
        _check_shape(text, tpu, match[2])
        return Slice(generation, match[2])
    chips, rest = divmod(int(match[3]), 2 if tpu.cores_in_type else 1)
    if rest or chips not in tpu.shapes:
        sizes = ", ".join(str(size) for size in tpu.shapes if size.bit_count() == 1)
        raise UserError(
            f"{text!r} has no usual shape; slices of {generation} have {sizes} chips, others are"
            f" written out, such as {generation}:{tpu.shapes[16]}"
        )
    return Slice(generation, tpu.shapes[chips])


def _check_shape(text: str, tpu: Tpu, shape: str) -> None:
    """Raises a `UserError` for a shape that does not consist of hosts, which have 2x2 chips."""
    usual = tpu.shapes[16]
    sides = [int(side) for side in shape.split("x")]
    if shape in tpu.shapes.values():
        return
    even = all(side % 2 == 0 for side in sides[:2])
    if len(sides) != usual.count("x") + 1 or min(sides) < 1 or not even:
        raise UserError(
            f"{text!r} is no shape of a slice; write {usual.count('x') + 1} sides, of which the"
            f" first two are even, such as {text.partition(':')[0]}:{usual}"
        )
