"""Utilization of the machines of a run: MFU, goodput, memory, and the host that is last."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.parallel import accelerators
from vit_jax.tracking.step_log import Stopwatch
from vit_jax.training.run import Run


class Monitor:
    """Adds the values that the step itself cannot know to every row of training metrics.

    - `train/images_per_sec_per_chip`, and `train/mfu` on chips whose peak is known: model FLOPs
      over that peak, as Chowdhery et al. (2022, PaLM, appendix B) define it. Recomputation under
      remat is no model FLOP; the backward pass counts as two forward ones.
    - `train/goodput`: share of the run's time, over all its attempts, in which steps ran.
    - `train/run_seconds`: that time.
    - `device/memory_gib`, `device/peak_memory_gib`: of the fullest device of process 0.
    - with several processes `hosts/...`: the longest input wait, and who came last to this row.
    """

    def __init__(self, run: Run, times: Stopwatch):
        device = run.mesh.devices.flat[0]
        chip = accelerators.of_kind(device.device_kind)
        self._chips = max(1, run.mesh.size // chip.devices) if chip else run.mesh.size
        # Counting traces the model once more: only where there is something to compare with.
        self._flops = run.train_flops_per_example() if chip else 0
        self._peak = chip.flops_per_device * run.mesh.size if chip else 0.0
        self._times = times

    def row(self, images_per_sec: float, input_wait_fraction: float) -> dict[str, float]:
        """Returns the additions to a row; every process must call this for the same rows."""
        found = {"train/images_per_sec_per_chip": images_per_sec / self._chips}
        if self._peak:
            found["train/mfu"] = images_per_sec * self._flops / self._peak
        found["train/goodput"] = self._times.goodput()
        found["train/run_seconds"] = self._times.total()
        found |= device_memory()
        if jax.process_count() > 1:
            mine = np.array([input_wait_fraction, *_split(time.time())])
            found |= compare_hosts(multihost_utils.process_allgather(mine))
        return found


def device_memory() -> dict[str, float]:
    """Returns the memory of this process's fullest device, if its platform reports it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"memory_gib": "bytes_in_use", "peak_memory_gib": "peak_bytes_in_use"}
    return {
        f"device/{name}": max(stat[key] for stat in stats) / accelerators.GIB
        for name, key in names.items()
        if all(key in stat for stat in stats)
    }


class _Moment(NamedTuple):
    """A time in two numbers, which float32 holds to a tenth of a millisecond or better."""

    minutes: float
    seconds: float


def _split(seconds: float) -> _Moment:
    # Minutes of a day are enough to tell hosts apart.
    minutes, rest = divmod(seconds % 86400, 60)
    return _Moment(minutes, rest)


def compare_hosts(rows: np.ndarray) -> Mapping[str, float]:
    """Returns which process waits longest for input, and which reached this row last.

    Args:
      rows: `[processes, 3]`: the input wait, and minutes and seconds of the host's own clock when
        the process reached the row.
    """
    waits, arrivals = rows[:, 0], rows[:, 1].astype(np.float64) * 60 + rows[:, 2]
    return {
        "hosts/input_wait_fraction_max": float(waits.max()),
        "hosts/longest_input_wait": int(waits.argmax()),
        "hosts/arrival_spread_seconds": float(arrivals.max() - arrivals.min()),
        "hosts/last_to_arrive": int(arrivals.argmax()),
    }
