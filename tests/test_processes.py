"""Several processes on loopback: the same batches, losses and evaluation as one process."""

import json
import os
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


def train(workdir, npz, processes, *overrides):
    """Runs the command in `processes` processes of one device each; returns their exit codes."""
    command = [
        sys.executable, "-m", "vit_jax", "train", f"--config={TINY}:npz={npz},steps={STEPS}",
        f"--workdir={workdir}", "--config.optim.schedule.name=constant", *overrides,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "PYTHONPATH": str(TINY.parent.parent),
    }
    port = free_port()
    started = [
        subprocess.Popen(
            [
                *command,
                f"--coordinator=127.0.0.1:{port}",
                f"--num-processes={processes}",
                f"--process-id={index}",
            ]
            if processes > 1
            else command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(processes)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs
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
    outputs = train(tmp_path, digits_npz, 2)
    assert "report:" in outputs[0][0]
    assert "step" not in "".join(outputs[1])  # Only the first process speaks.
    together, single = rows(tmp_path, "train/loss"), rows(alone, "train/loss")
    assert list(together) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(together.values()), list(single.values()), rtol=2e-5)
    assert rows(tmp_path, "eval/val/num_examples") == rows(alone, "eval/val/num_examples")
    assert rows(tmp_path, "eval/val/accuracy") == rows(alone, "eval/val/accuracy")


def test_a_run_of_one_process_goes_on_in_two_and_back(alone, digits_npz, tmp_path):
    train(tmp_path, digits_npz, 1, "--config.total=3")
    train(tmp_path, digits_npz, 2, "--config.total=6")
    train(tmp_path, digits_npz, 1)
    pieces, whole = rows(tmp_path, "train/loss"), rows(alone, "train/loss")
    assert list(pieces) == list(whole)
    np.testing.assert_allclose(list(pieces.values()), list(whole.values()), rtol=2e-5)
