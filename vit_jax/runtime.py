"""What a process sets up before the first JAX computation, and how it is told to stop."""

import ctypes
import dataclasses
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the other processes of this run are; empty: there are none."""

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1


def setup(compilation_cache: str, precision: str, cluster: Cluster = Cluster()) -> None:
    """Joins the cluster, switches the compilation cache on and sets the matmul precision."""
    _keep_freed_memory()
    if cluster.coordinator:
        if jax.config.jax_platforms == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            heartbeat_timeout_seconds=30,
        )
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if precision != "default":
        jax.config.update("jax_default_matmul_precision", precision)


def _keep_freed_memory() -> None:
    """Tells glibc to keep what a step frees, for the next one.

    On CPUs XLA allocates a step's temporaries with malloc, from many threads. By default each
    thread's arena gives them back to the kernel, which faults them in again, page by page, at the
    next step: a quarter of the time of a small model's step.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # Another C library, another allocator.
        return
    for parameter, value in (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, 1 << 30),
        (_M_TRIM_THRESHOLD, (1 << 31) - 1),
    ):
        mallopt(parameter, value)


class StopSignal:
    """Within the `with` block SIGTERM and Ctrl-C ask for a stop instead of ending the process.

    A second Ctrl-C ends it at once.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    @property
    def name(self) -> str | None:
        """The signal that arrived in this process, if one did."""
        return self._received

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    def agreed(self, step: int) -> bool:
        """Whether all processes stop after `step`; every process must ask at every step."""
        if jax.process_count() == 1:
            return self.asked()
        return multihost_utils.reached_preemption_sync_point(step)
