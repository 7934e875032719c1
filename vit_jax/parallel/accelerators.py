"""What accelerators can at most do, as their makers publish it.

TPU figures are those of Google Cloud's page of each generation (docs.cloud.google.com/tpu/docs/v2
to /v6e and /tpu7x, read 2026), of v2 and v3 of Jouppi et al. (2020), "A domain-specific
supercomputer for training deep neural networks", Table 3. GPU figures are those of NVIDIA's data
sheets: dense products, not the doubled ones with structured sparsity.
"""

import dataclasses
import re

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    name: as `--topology` and the makers call it.
    devices: JAX devices that one chip counts as; a device has that share of everything below.
    flops: bfloat16 matrix products, FLOP a second.
    hbm_bytes, hbm_bandwidth: memory, and bytes a second to and from it.
    link_bandwidth: bytes a second over all of a chip's links to others (ICI, NVLink), both
      directions together.
    dcn_bandwidth: a chip's share of its host's network, bytes a second in one direction; 0 where
      it is not published, or depends on the machine around the chip.
    """

    name: str
    devices: int
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float = 0.0

    @property
    def flops_per_device(self) -> float:
        return self.flops / self.devices

    @property
    def hbm_bytes_per_device(self) -> int:
        return self.hbm_bytes // self.devices


CHIPS = {
    chip.name: chip
    for chip in (
        # v2, v3: four links of 496 and 656 Gbit/s, each in both directions.
        Chip("v2", 2, 46e12, 16 * GIB, 700e9, 496e9),
        Chip("v3", 2, 123e12, 32 * GIB, 900e9, 656e9),
        # v4: six links of 50 GB/s in each direction.
        Chip("v4", 1, 275e12, 32 * GIB, 1200e9, 600e9),
        Chip("v5e", 1, 197e12, 16 * GIB, 819e9, 400e9, 25e9 / 8),
        Chip("v5p", 1, 459e12, 95 * GIB, 2765e9, 1200e9, 50e9 / 8),
        Chip("v6e", 1, 918e12, 32 * GIB, 1640e9, 800e9, 100e9 / 8),
        Chip("tpu7x", 2, 2307e12, 192 * GIB, 7380e9, 1200e9, 100e9 / 8),
        Chip("a100-40gb", 1, 312e12, 40 * 10**9, 1555e9, 600e9),
        Chip("a100-80gb", 1, 312e12, 80 * 10**9, 2039e9, 600e9),
        Chip("h100-pcie", 1, 756e12, 80 * 10**9, 2000e9, 600e9),
        Chip("h100", 1, 989e12, 80 * 10**9, 3350e9, 900e9),
        Chip("h200", 1, 989e12, 141 * 10**9, 4800e9, 900e9),
        Chip("b200", 1, 2250e12, 180 * 10**9, 8000e9, 1800e9),
    )
}

# What `jax.Device.device_kind` says; the first match wins.
_KINDS = (
    (r"TPU v2", "v2"),
    (r"TPU v3", "v3"),
    (r"TPU v4(?! lite)", "v4"),
    (r"TPU v5 ?(lite|e)", "v5e"),
    (r"TPU v5p?$", "v5p"),
    (r"TPU v6 ?(lite|e)", "v6e"),
    (r"TPU ?7x", "tpu7x"),
    (r".*\bA100.*80GB", "a100-80gb"),
    (r".*\bA100", "a100-40gb"),
    (r".*\bH100 PCIe", "h100-pcie"),
    (r".*\bH100", "h100"),
    (r".*\bH200", "h200"),
    (r".*\bB200", "b200"),
)


def of_kind(device_kind: str) -> Chip | None:
    """The chip behind a JAX device; None for CPUs and for what is not in the table."""
    names = (name for pattern, name in _KINDS if re.match(pattern, device_kind))
    return CHIPS.get(next(names, ""))
