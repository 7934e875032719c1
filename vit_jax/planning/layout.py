"""The layout of a step over chips, and alternative layouts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

SHARDED_TIME, ZERO1_TIME = 0.01, 0.001
"""The time that sharding adds to a step, as a share of it, through more or later communication."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh over the chips of one or several slices.

    Attributes:
      mesh: axis -> size, as in `config.mesh`.
      zero1: whether the optimizer's state is sharded over `data` too.
      num_devices, num_slices: the numbers of devices and of slices of the whole mesh.
      sides: the number of chips along each side of a TPU slice; empty for other devices.
    """

    mesh: Mapping[str, int]
    zero1: bool
    num_devices: int
    num_slices: int
    sides: tuple[int, ...] = ()

    @property
    def gradient_shards(self) -> int:
        """Returns the number of devices of a slice that split gradients, without `tensor`."""
        return self.mesh["fsdp"] * (self._data_in_slice if self.zero1 else 1)

    @property
    def _data_in_slice(self) -> int:
        return self.mesh["data"] // self.num_slices

    def keys(self) -> dict[str, Any]:
        """Returns the layout as keys of `config.mesh`."""
        return {**self.mesh, "zero1": self.zero1}

    def on_part_of_slice(self) -> dict[str, Any] | None:
        """Returns `config.mesh` with parameters split over a slice except for its shortest side.

        Returns None if nothing is sharded, or only over a part of the slice. XLA scatters and
        gathers over lines, planes and other parts of a torus, but over a whole torus only on slices
        as short as 2x4. On other slices it sums whole arrays, and sends twice as much. With ZeRO-1
        this applies to any mesh whose `data` and `fsdp` fill a slice.
        """
        shards = self.gradient_shards
        shortest = min((side for side in self.sides if side > 1), default=1)
        is_whole = shards * self.mesh["tensor"] == self.num_devices // self.num_slices
        if not is_whole or shards % shortest or shards == shortest:
            return None
        part = {"data": self.num_slices * shortest, "fsdp": shards // shortest}
        return {**self.mesh, **part, "zero1": False}

    def alternatives(self) -> list[dict[str, Any]]:
        """Returns the `config.mesh` of each layout to try, this one first.

        The others use ZeRO-1, shard parameters over a part of the slice, where sums are scattered,
        and then over all devices that shared only the batch.
        """
        options = [self.keys()]
        if self.mesh["data"] > 1:
            options.append({**self.mesh, "zero1": True})
        if self._data_in_slice > 1:
            fsdp = self.mesh["fsdp"] * self._data_in_slice
            mesh = {"data": self.num_slices, "fsdp": fsdp, "tensor": self.mesh["tensor"]}
            sharded = dataclasses.replace(self, mesh=mesh)
            part = sharded.on_part_of_slice()
            options += [part] if part else []
            options.append(sharded.keys())
        return options

    def splits_more(self, keys: Mapping[str, Any]) -> tuple[float, float]:
        """Returns the factors by which another layout splits parameters and optimizer state more.

        keys: the other layout as keys of `config.mesh`.
        """
        ways = keys["fsdp"] / self.mesh["fsdp"]
        mirrors = keys["data"] if keys["zero1"] else 1
        return ways, ways * mirrors / (self.mesh["data"] if self.zero1 else 1)


def time_factor(keys: Mapping[str, Any]) -> float:
    """Returns the estimated time of a step relative to one without sharding, for keys of a mesh."""
    return 1 + SHARDED_TIME * (keys["fsdp"] > 1) + ZERO1_TIME * keys["zero1"]
