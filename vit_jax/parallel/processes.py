"""What a process sets up before the first JAX computation, and how it is told to stop."""

import ctypes
import dataclasses
import os
import re
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import jax
from jax.experimental import multihost_utils

from vit_jax.errors import LostProcess, UserError

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# In bytes. Up to the smallest, glibc has a list for each size, and nothing to look through.
_SMALLEST_GAP, _LARGEST_GAP = 1024, 2**24

HEARTBEAT_SECONDS = 30
"""After this silence a process counts as lost, and the others end."""

JOIN_SECONDS = 300
"""How long a process waits for the others at the start."""

_GOOGLE_PCI_VENDOR = "0x1ae0"

# What is said of a lost peer: by collectives (Gloo, NCCL) and the coordination service, whoever
# raises it, and by JAX's own errors, where the same words could not come from a file's storage.
_LOST = re.compile(r"Gloo \w+ failed|NCCL .*remote process|[Cc]oordination ?[Ss]ervice|heartbeat")
_LOST_FOR_JAX = re.compile(
    r"Connection (?:closed|reset|refused)|Broken pipe|UNAVAILABLE|DEADLINE_EXCEEDED|[Tt]imed out"
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the other processes of this run are; empty: the scheduler says, or there are none.

    Raises:
      UserError: only some of the three are given, or the number of this process is out of range.
    """

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1

    def __post_init__(self) -> None:
        given = (bool(self.coordinator), self.num_processes != 0, self.process_id != -1)
        if any(given) and not all(given):
            raise UserError(
                "--coordinator=HOST:PORT, --num-processes=N and --process-id=I go together: give"
                " all three, or none where the scheduler tells them"
            )
        if all(given) and not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process-id={self.process_id} must be from 0 to {self.num_processes - 1}"
                f" (--num-processes={self.num_processes})"
            )
        if self.coordinator and not re.fullmatch(r".+:\d+", self.coordinator):
            raise UserError(f"--coordinator={self.coordinator!r}: write HOST:PORT")


def setup(compilation_cache: str, precision: str, cluster: Cluster = Cluster()) -> None:
    """Joins the cluster, switches the compilation cache on and sets the matmul precision.

    Raises:
      UserError: the scheduler started several processes, but does not say where they meet.
      LostProcess: the other processes did not come.
    """
    _keep_freed_memory()
    if cluster.coordinator or scheduler(os.environ):
        _join(cluster)
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if precision != "default":
        jax.config.update("jax_default_matmul_precision", precision)


def _join(cluster: Cluster) -> None:
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    found = (cluster.coordinator, cluster.num_processes, cluster.process_id)
    try:
        jax.distributed.initialize(
            *(found if cluster.coordinator else ()),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=JOIN_SECONDS,
        )
    except RuntimeError as error:
        where = cluster.coordinator or "the address that the scheduler gave"
        raise LostProcess(f"the processes of this run did not meet at {where}: {error}") from error


def scheduler(environ: Mapping[str, str]) -> str:
    """Who started this process as one of several: slurm, openmpi, gke or tpu; empty for nobody.

    Looks at variables and at what is plugged in, never at the network, so that a machine of its own
    starts at once. `jax.distributed.initialize` then finds the details by itself.

    Raises:
      UserError: an MPI whose variables do not name a place to meet.
    """

    def several(*names: str) -> bool:
        return any(int(environ.get(name) or 1) > 1 for name in names)

    if several("OMPI_COMM_WORLD_SIZE"):
        if "OMPI_MCA_orte_hnp_uri" not in environ:  # Open MPI 5 no longer sets it.
            raise UserError(
                "mpirun does not say where the processes meet: add --coordinator=HOST:PORT"
                " --num-processes=$OMPI_COMM_WORLD_SIZE --process-id=$OMPI_COMM_WORLD_RANK"
            )
        return "openmpi"
    # Set together only by srun: a batch script, or a shell in an allocation, is a single process.
    if "SLURM_STEP_NODELIST" in environ and several("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        return "slurm"
    if environ.get("JAX_PLATFORMS", "tpu").startswith("tpu") and has_tpu_chips():
        workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
        if workers is None:
            return "" if "TPU_SKIP_MDS_QUERY" in environ else "tpu"
        return "gke" if "," in workers or several("MEGASCALE_NUM_SLICES") else ""
    return ""


def has_tpu_chips() -> bool:
    """Whether TPU chips are plugged into this machine."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    accelerators = Path("/dev").glob("accel[0-9]*"), Path("/dev/vfio").glob("[0-9]*")
    return any(any(found) for found in accelerators) and any(
        vendor.read_text().strip() == _GOOGLE_PCI_VENDOR for vendor in vendors
    )


def lost_process(error: BaseException) -> str:
    """One line where an error only tells that another process of this run is gone, else nothing."""
    while error is not None:
        text = str(error)
        from_jax = isinstance(error, jax.errors.JaxRuntimeError)
        if _LOST.search(text) or (from_jax and _LOST_FOR_JAX.search(text)):
            return text.strip().splitlines()[0][:200]
        error = error.__cause__ or error.__context__
    return ""


def _keep_freed_memory() -> None:
    """Tells glibc to keep what a step frees, for the next one.

    On CPUs XLA allocates a step's temporaries with malloc, from many threads. By default each
    thread's arena gives them back to the kernel, and blocks above 32 MiB always go back, whatever
    the threshold for them says; the kernel faults them in again, page by page, at the next step.
    That is a quarter of the time of a small model's step, and a third of ViT-Ti/16's. So there is
    one arena, no block is mapped on its own, and nothing is trimmed.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # Another C library, another allocator.
        return
    for parameter, value in (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, -1),
    ):
        mallopt(parameter, value)


_taken: list[int] = []
"""Where the gaps are that `take_gaps` has taken."""


class _Mallinfo2(ctypes.Structure):
    """What glibc says of its heap, in bytes; `keepcost` is free at the end of it."""

    _fields_ = (("others", ctypes.c_size_t * 9), ("keepcost", ctypes.c_size_t))


def take_gaps() -> None:
    """Takes what compiling has left free between blocks that are in use.

    Those are tens of thousands of gaps of all sizes. malloc looks through the ones of about the
    size that it needs while the threads of a step, and those that decode images, wait for it: a
    step of the digits' model took 1.3 times as long in the process that had compiled it as where it
    was loaded. To be called before the first step, because later gaps are what a step leaves for
    the next one. They stay in memory, as they would have; another call gives them back first.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallinfo2.restype = _Mallinfo2
    except (OSError, AttributeError):  # Another C library, or one before 2.33.
        return
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    while _taken:
        libc.free(_taken.pop())
    end_of_gaps = libc.sbrk(0) - libc.mallinfo2().keepcost
    size = _LARGEST_GAP
    while size >= _SMALLEST_GAP:
        block = libc.malloc(size)
        if block and block < end_of_gaps:
            _taken.append(block)
            continue
        libc.free(block)
        size = size * 7 // 8


class StopSignal:
    """Within the `with` block SIGTERM and Ctrl-C ask for a stop instead of ending the process.

    A second Ctrl-C ends it at once. Of several processes any may be told: JAX listens for SIGTERM
    in each since they met, and has all of them stop after the same step.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        is_alone = jax.process_count() == 1  # Else SIGTERM must go on reaching JAX.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM) if is_alone else (signal.SIGINT,):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def name(self) -> str:
        """The signal that arrived, as far as this process knows."""
        return self._received or "a signal"

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    def agreed(self, step: int) -> bool:
        """Whether all processes stop after `step`; every process must ask at every step."""
        if jax.process_count() == 1:
            return self.asked()
        return multihost_utils.reached_preemption_sync_point(step)
