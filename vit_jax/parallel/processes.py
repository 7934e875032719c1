"""The set-up of a process before the first JAX computation; the other processes of its run."""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax

from vit_jax.errors import LostProcess, UserError, first_line
from vit_jax.parallel.host_memory import keep_freed_memory

HEARTBEAT_SECONDS = 30
"""A process that is silent for this long counts as lost, and the others end."""

JOIN_SECONDS = 300
"""The time for which a process waits for the others at the start."""

_GOOGLE_PCI_VENDOR = "0x1ae0"

# Messages about a lost process. The first come from collectives (Gloo, NCCL) and the coordination
# service; the second count only in JAX's own errors, since storage may use the same words.
_LOST = re.compile(r"Gloo \w+ failed|NCCL .*remote process|[Cc]oordination ?[Ss]ervice|heartbeat")
_LOST_FOR_JAX = re.compile(
    r"Connection (?:closed|reset|refused)|Broken pipe|UNAVAILABLE|DEADLINE_EXCEEDED|[Tt]imed out"
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The address and the number of the processes of this run, as the flags give them.

    Without values they come from the scheduler, or there is only one process.

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
    """Joins the other processes, turns the compilation cache on and sets the matmul precision.

    Raises:
      UserError: the scheduler started several processes, but does not give their address.
      LostProcess: the other processes did not arrive.
    """
    keep_freed_memory()
    is_joined = jax.distributed.is_initialized()  # As in the second run of a notebook.
    if not is_joined and (cluster.coordinator or scheduler(os.environ)):
        _join(cluster)
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if precision != "default":
        jax.config.update("jax_default_matmul_precision", precision)


def _join(cluster: Cluster) -> None:
    if jax.config.values["jax_platforms"] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    join = functools.partial(
        jax.distributed.initialize,
        cluster_detection_method=_detection(cluster),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        initialization_timeout=JOIN_SECONDS,
    )
    try:
        if cluster.coordinator:
            join(cluster.coordinator, cluster.num_processes, cluster.process_id)
        else:
            join()
    except RuntimeError as error:
        where = cluster.coordinator or "the address that the scheduler gave"
        raise LostProcess(f"the processes of this run did not meet at {where}: {error}") from error


def _detection(cluster: Cluster) -> str | None:
    """Returns JAX's name of the cluster where it would ask SLURM first, but TPUs are here."""
    if cluster.coordinator or "SLURM_JOB_ID" not in os.environ:
        return None
    return {"tpu": "gcetpu", "gke": "gketpu"}.get(scheduler(os.environ))


def scheduler(environ: Mapping[str, str]) -> str:
    """Returns the scheduler that started several processes: slurm, openmpi, gke, tpu, or "".

    It looks at environment variables and local devices, never at the network, so that a single
    machine starts at once. `jax.distributed.initialize` then finds the details.

    Raises:
      UserError: the variables of MPI contain no address.
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
    # TPUs go before SLURM, which also runs slices of Google Cloud (Cluster Toolkit): their order of
    # hosts is that of the slice, not that of SLURM.
    if environ.get("JAX_PLATFORMS", "tpu").startswith("tpu") and has_tpu_chips():
        workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
        if workers is None:
            return "" if "TPU_SKIP_MDS_QUERY" in environ else "tpu"
        return "gke" if "," in workers or several("MEGASCALE_NUM_SLICES") else ""
    # Set together only by srun: a batch script, or a shell in an allocation, is a single process.
    if "SLURM_STEP_NODELIST" in environ and several("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        return "slurm"
    return ""


def has_tpu_chips() -> bool:
    """Returns whether this machine has TPU chips."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    accelerators = Path("/dev").glob("accel[0-9]*"), Path("/dev/vfio").glob("[0-9]*")
    return any(any(found) for found in accelerators) and any(
        vendor.read_text().strip() == _GOOGLE_PCI_VENDOR for vendor in vendors
    )


def lost_process(error: BaseException) -> str:
    """Returns one line if an error only says that another process of this run is gone, or ""."""
    link: BaseException | None = error
    while link is not None:
        text = str(link)
        from_jax = isinstance(link, jax.errors.JaxRuntimeError)
        if _LOST.search(text) or (from_jax and _LOST_FOR_JAX.search(text)):
            return first_line(link)
        link = link.__cause__ or link.__context__
    return ""
