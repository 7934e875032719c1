"""The batch script: what it starts, and when it queues itself again."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts/slurm.sh"


@pytest.fixture
def batch(tmp_path):
    """`batch(code)` runs the script where `srun` ends with `code`; files hold what was called."""
    tools = tmp_path / "tools"
    tools.mkdir()

    def run(code, state="RUNNING", **variables):
        for name, text in (
            ("srun", f'echo "$@" >> {tmp_path}/srun; exit {code}'),
            ("scontrol", f'echo "$@" >> {tmp_path}/scontrol'),
            ("squeue", f"echo {state}"),
        ):
            (tools / name).write_text(f"#!/bin/bash\n{text}\n")
            (tools / name).chmod(0o755)
        slurm = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_NTASKS_PER_NODE": "8",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "12",
        }
        return subprocess.run(
            [SCRIPT, "--config=c.py", "--workdir=/shared/run"],
            env={**os.environ, **slurm, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("code", "requeued"),
    [(0, False), (1, False), (2, False), (75, True), (134, True), (137, True), (143, True)],
)
def test_a_run_that_was_cut_short_is_queued_again(tmp_path, batch, code, requeued):
    done = batch(code)
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    else:
        assert not (tmp_path / "scontrol").exists()
    assert done.returncode == (0 if requeued else code)
    started = (tmp_path / "srun").read_text()
    assert "train --config=c.py --workdir=/shared/run" in started
    assert "--cpus-per-task=12" in started  # sbatch's own does not reach srun.


def test_a_job_that_was_cancelled_stays_away(tmp_path, batch):
    assert batch(75, state="COMPLETING").returncode == 75
    assert not (tmp_path / "scontrol").exists()


def test_short_attempts_come_to_an_end(tmp_path, batch):
    assert batch(137, SLURM_RESTART_COUNT="19").returncode == 0
    done = batch(137, SLURM_RESTART_COUNT="20")
    assert done.returncode == 137
    assert "20 times before; giving up" in done.stderr


def test_nodes_with_fewer_gpus_want_fewer_processes(tmp_path, batch):
    done = batch(0, SLURM_GPUS_ON_NODE="4")
    assert done.returncode == 2
    assert "4 GPUs and 8 processes a node; give sbatch" in done.stderr
    assert not (tmp_path / "srun").exists()


def test_a_tpu_node_has_one_process(tmp_path, batch):
    (tmp_path / "dev/vfio").mkdir(parents=True)
    (tmp_path / "dev/vfio/0").touch()
    tpu = {"VIT_JAX_DEV": str(tmp_path / "dev"), "SLURM_GPUS_ON_NODE": ""}
    done = batch(0, **tpu)
    assert done.returncode == 2
    assert "8 processes on a TPU node; give sbatch --ntasks-per-node=1" in done.stderr
    assert batch(0, SLURM_NTASKS_PER_NODE="1", **tpu).returncode == 0
