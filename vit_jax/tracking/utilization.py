"""The use of a run's machines: utilization, goodput, memory and the slowest host."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.parallel import accelerators
from vit_jax.tracking.step_log import Stopwatch


class Monitor:
    """Adds to every row of training metrics values that the step cannot compute.

    - `train/images_per_sec_per_chip`, and `train/mfu` on chips whose peak is known: model FLOPs
      over that peak, as Chowdhery et al. (2022, PaLM, appendix B) define it. Recomputation under
      remat does not count; the backward pass counts as two forward passes.
    - `train/goodput`: the fraction of the run's time, over all its attempts, in which steps ran.
    - `train/run_seconds`: that time.
    - `device/memory_gib`, `device/peak_memory_gib`: of the fullest device of process 0.
    - `hosts/...`, with several processes: the longest input wait, and the last host at this row.

    Args:
      device_kind: the kind of the run's devices, as JAX names it.
      num_devices: the number of devices of the run.
      flops_per_example: returns the model FLOPs of a training step for one example, which may
        change during a run. It is called only if the devices' peak is known, because counting
        traces the model once more.
      times: the clock of the run.
    """

    def __init__(
        self,
        device_kind: str,
        num_devices: int,
        flops_per_example: Callable[[], float],
        times: Stopwatch,
    ):
        chip = accelerators.of_kind(device_kind)
        self._chips = max(1, num_devices // chip.devices) if chip else num_devices
        self._flops_per_example = flops_per_example
        self._peak = chip.flops_per_device * num_devices if chip else 0.0
        self._times = times

    def row(self, images_per_sec: float, input_wait_fraction: float) -> dict[str, float]:
        """Returns the additions to a row; every process must call this for the same rows."""
        found = {"train/images_per_sec_per_chip": images_per_sec / self._chips}
        if self._peak:
            found["train/mfu"] = images_per_sec * self._flops_per_example() / self._peak
        found["train/goodput"] = self._times.goodput()
        found["train/run_seconds"] = self._times.total()
        found |= device_memory()
        if jax.process_count() > 1:
            own = np.array([input_wait_fraction, *_split(time.time())])
            found |= compare_hosts(multihost_utils.process_allgather(own))
        return found


def device_memory() -> dict[str, float]:
    """Returns the memory of this process's fullest device; {} on platforms without the figures."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"memory_gib": "bytes_in_use", "peak_memory_gib": "peak_bytes_in_use"}
    return {
        f"device/{name}": max(stat[key] for stat in stats) / accelerators.GIB
        for name, key in names.items()
        if all(key in stat for stat in stats)
    }


class _Moment(NamedTuple):
    """A time as two numbers, each of which float32 resolves to 0.1 milliseconds or better."""

    minutes: float
    seconds: float


def _split(seconds: float) -> _Moment:
    # The minutes of one day are enough to distinguish hosts.
    minutes, rest = divmod(seconds % 86400, 60)
    return _Moment(minutes, rest)


def compare_hosts(hosts: np.ndarray) -> Mapping[str, float]:
    """Returns the metrics `hosts/...`, which name the host that delays the others.

    Args:
      hosts: `[processes, 3]`: the input wait of each process, and the minutes and seconds at which
        it reached the row, by its own clock.
    """
    waits, arrivals = hosts[:, 0], hosts[:, 1].astype(np.float64) * 60 + hosts[:, 2]
    return {
        "hosts/input_wait_fraction_max": float(waits.max()),
        "hosts/longest_input_wait": int(waits.argmax()),
        "hosts/arrival_spread_seconds": float(arrivals.max() - arrivals.min()),
        "hosts/last_to_arrive": int(arrivals.argmax()),
    }
