"""Who started this process, what the flags must say, and which errors mean a lost process."""

import jax
import pytest

from vit_jax.errors import LostProcess, UserError
from vit_jax.parallel import processes
from vit_jax.parallel.processes import Cluster

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPENMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:3"}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, ""),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, ""),  # No srun.
        (OPENMPI, "openmpi"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, ""),  # No TPU here.
    ],
)
def test_schedulers_are_known_by_their_variables(environ, found):
    assert processes.scheduler(environ) == found


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": "localhost"}, ""),  # Kaggle.
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "gke"),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}, "gke"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "gke"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, ""),
        ({"JAX_PLATFORMS": "cpu"}, ""),
        (SLURM, "tpu"),  # SLURM on Google Cloud: the slice knows the order of its hosts.
        (SLURM | {"TPU_WORKER_HOSTNAMES": "a,b"}, "gke"),
        (SLURM | {"JAX_PLATFORMS": "cpu"}, "slurm"),
    ],
)
def test_where_a_tpu_is_plugged_in(environ, found, monkeypatch):
    monkeypatch.setattr(processes, "has_tpu_chips", lambda: True)
    assert processes.scheduler(environ) == found


def test_an_mpi_that_names_no_place_says_what_to_add():
    with pytest.raises(UserError, match="mpirun does not say"):
        processes.scheduler({"OMPI_COMM_WORLD_SIZE": "2"})


@pytest.fixture
def joins(monkeypatch):
    """The calls of `jax.distributed.initialize`, which does nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    for name in ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_machine_of_its_own_joins_nothing(joins):
    processes.setup("", "default")
    assert joins == []


def test_a_scheduler_is_left_to_tell_the_details(joins, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    processes.setup("", "default")
    assert joins == [()]


def test_tpu_nodes_under_slurm_are_joined_as_a_slice(joins, monkeypatch):
    methods = []

    def note(*_, cluster_detection_method, **__):
        methods.append(cluster_detection_method)

    monkeypatch.setattr(jax.distributed, "initialize", note)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    for name, value in (SLURM | {"JAX_PLATFORMS": "tpu"}).items():
        monkeypatch.setenv(name, value)
    for chips in (True, False):
        monkeypatch.setattr(processes, "has_tpu_chips", lambda chips=chips: chips)
        processes.setup("", "default")
    assert methods == ["gcetpu", None]


def test_flags_go_before_the_scheduler(joins, monkeypatch):
    for name, value in OPENMPI.items():
        monkeypatch.setenv(name, value)
    processes.setup("", "default", Cluster("host:1234", 2, 1))
    assert joins == [("host:1234", 2, 1)]


def test_processes_that_do_not_meet_are_told_as_such(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(LostProcess, match="did not meet at host:1: DEADLINE_EXCEEDED"):
        processes.setup("", "default", Cluster("host:1", 2, 0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1",), "go together"),
        (("", 2, 0), "go together"),
        (("host:1", 2, 2), "must be from 0 to 1"),
        (("host", 2, 0), "write HOST:PORT"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(UserError, match=message):
        Cluster(*flags)


def test_a_lost_process_is_told_from_other_errors():
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer\n")
    assert processes.lost_process(gone).endswith("Connection closed by peer")
    told = UserError("cannot save a checkpoint")
    assert not processes.lost_process(told)
    told.__cause__ = gone
    assert processes.lost_process(told)
    assert processes.lost_process(ValueError("UNKNOWN: Gloo AllReduce failed: Read error"))
    restarted = TimeoutError("Timed out while waiting for async_write_complete barrier.")
    restarted.__cause__ = jax.errors.JaxRuntimeError(
        "INTERNAL: Barrier failed because: task is set to ERROR: ABORTED: 1 unexpectedly tried to"
        " connect with a different incarnation. It has likely restarted."
        " [type.googleapis.com/tensorflow.CoordinationServiceError='']"
    )
    assert "likely restarted" in processes.lost_process(restarted)
    assert processes.lost_process(jax.errors.JaxRuntimeError("UNAVAILABLE: socket closed"))
    assert not processes.lost_process(
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    )
    assert not processes.lost_process(ValueError("Connection reset"))
