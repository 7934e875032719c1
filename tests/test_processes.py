"""Several processes on loopback: the same batches, losses and evaluation as one process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TINY = Path(__file__).parent / "tiny.py"
STEPS = 8


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir, npz, processes, *overrides, scheduler=False):
    """Starts the command in `processes` processes of one device each.

    scheduler: let variables tell them of each other, as SLURM sets them, instead of flags.
    """
    command = [
        sys.executable, "-m", "vit_jax", "train", f"--workdir={workdir}",
        "--config.optim.schedule.name=constant", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(TINY.parent.parent)}
    port = free_port()
    started = []
    for index in range(processes):
        own, variables = [f"--config={TINY}:npz={npz},steps={STEPS}"], {}
        if callable(npz):
            own = [f"--config={TINY}:npz={npz(index)},steps={STEPS}"]
        if processes > 1 and scheduler:
            variables = {
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_NTASKS": str(processes),
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
                "JAX_COORDINATOR_PORT": str(port),
            }
        elif processes > 1:
            own += [
                f"--coordinator=127.0.0.1:{port}",
                f"--num-processes={processes}",
                f"--process-id={index}",
            ]
        started.append(
            subprocess.Popen(
                [*command, *own],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**environment, **variables},
            )
        )
    return started


def train(*args, **kwargs):
    """Runs the command to its end; returns what each process said."""
    started = start(*args, **kwargs)
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs
    return outputs


def rows(workdir, name):
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if name in row:
            assert row["step"] not in found
            found[row["step"]] = row[name]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory, digits_npz):
    workdir = tmp_path_factory.mktemp("alone")
    train(workdir, digits_npz, 1)
    return workdir


def test_two_processes_train_and_evaluate_as_one(alone, digits_npz, tmp_path):
    outputs = train(tmp_path, digits_npz, 2, scheduler=True)
    assert "report:" in outputs[0][0]
    assert "step" not in "".join(outputs[1])  # Only the first process speaks.
    together, single = rows(tmp_path, "train/loss"), rows(alone, "train/loss")
    assert list(together) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(together.values()), list(single.values()), rtol=2e-5)
    assert rows(tmp_path, "eval/val/num_examples") == rows(alone, "eval/val/num_examples")
    assert rows(tmp_path, "eval/val/accuracy") == rows(alone, "eval/val/accuracy")
    assert set(rows(tmp_path, "hosts/last_to_arrive").values()) <= {0, 1}


def test_parents_start_a_run_again_that_lost_its_first_process(alone, digits_npz, tmp_path):
    """Two go on where one was; the one that the other met at is killed, and both start again."""
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    (workdir / "DONE").unlink()
    shutil.rmtree(workdir / f"checkpoints/{STEPS}")
    both = start(workdir, digits_npz, 2, "--config.checkpoint.every=1", "--restarts=1")
    wait_for_step(both[0], STEPS - 1)
    os.kill(child_of(both[0]), signal.SIGKILL)
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "ended by SIGKILL" in outputs[0][1]
    assert "another process of this run" in outputs[1][1]
    assert "starting again (1 of 1)" in outputs[1][1]
    assert_same_losses(workdir, alone)


def test_what_two_processes_began_before_one_was_killed_one_ends(alone, digits_npz, tmp_path):
    both = start(tmp_path, digits_npz, 2, "--config.checkpoint.every=1")
    wait_for_step(both[0], 5)
    both[1].kill()
    _, said = both[0].communicate(timeout=60)
    # 75 where Python learns of the loss first, SIGABRT where JAX does.
    assert both[0].returncode in (75, -signal.SIGABRT), said
    assert "Traceback" not in said
    both[1].communicate()
    train(tmp_path, digits_npz, 1)
    assert_same_losses(tmp_path, alone)


def wait_for_step(process, step):
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"the run ended before step {step}: {''.join(said)}")


def assert_same_losses(workdir, alone):
    pieces, whole = rows(workdir, "train/loss"), rows(alone, "train/loss")
    assert list(pieces) == list(whole)
    np.testing.assert_allclose(list(pieces.values()), list(whole.values()), rtol=2e-5)


def child_of(parent):
    """The process that a parent with `--restarts` watches over."""
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    return int(children[0])


def test_a_process_that_fails_by_itself_takes_the_others_along(digits_npz, tmp_path):
    """Its own file is missing: it says so, and the other does not wait for it for ever."""
    both = start(tmp_path, lambda index: digits_npz if index == 0 else "gone.npz", 2)
    outputs = [process.communicate(timeout=120) for process in both]
    assert both[1].returncode == 2
    assert "gone.npz" in outputs[1][1]
    assert both[0].returncode in (75, -signal.SIGABRT), outputs[0]
