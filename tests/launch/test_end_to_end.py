"""Runs on four hosts from create to done: preempted, cut off from the network, on each backend.

Every host is a process of this machine. Cut-off hosts need network namespaces, and so root.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fake_network
import numpy as np
import pytest

from vit_jax.__main__ import main

ROOT = Path(__file__).parent.parent.parent
STEPS = 6

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="copies a git checkout to the hosts"),
]

FLAGS = {
    "cloud_tpu": ["--type=v4-32", "--zone=z", "--spot"],
    "compute_engine": ["--backend=compute-engine", "--type=v6e-16", "--zone=us-east5-a",
                       "--project=p", "--spot"],
}  # fmt: skip


@pytest.fixture
def config(digits_npz):
    return [
        f"--config=tests/tiny.py:npz={digits_npz},steps={STEPS}",
        "--config.checkpoint.every=1",
        "--config.eval.every=3",
    ]


def launch(run, config, *more):
    command = [sys.executable, "-m", "vit_jax", "tpu", "train", "pod", f"--workdir={run}"]
    return subprocess.Popen(
        [*command, *config, "--poll=1", *more], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def finish(launcher, seconds=600):
    _, said = launcher.communicate(timeout=seconds)
    assert launcher.returncode == 0, said
    return said


def wait_for_checkpoint(run, launcher):
    deadline = time.monotonic() + 400
    while not any(path.name in ("2", "3") for path in run.glob("checkpoints/*")):
        assert launcher.poll() is None, launcher.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def hosts(cloud):
    found = json.loads((cloud / "nodes.json").read_text())
    return [host for entry in found.values() for host in entry["hosts"]]


def in_cloud(code):
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", f"import fake_gcloud; {code}"], cwd=here, check=True)


def preempt(host, state):
    in_cloud(f"fake_gcloud.kill_host({host!r}); fake_gcloud.set_state({host!r}, {state!r})")


def assert_undisturbed(run, config, tmp_path):
    alone = tmp_path / "alone"
    subprocess.run(
        [sys.executable, "-m", "vit_jax", "train", f"--workdir={alone}", *config],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, check=True, capture_output=True,
    )  # fmt: skip
    disturbed, undisturbed = losses(run), losses(alone)
    assert list(disturbed) == list(undisturbed) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(disturbed.values()), list(undisturbed.values()), rtol=2e-5)


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.mark.parametrize("backend", FLAGS)
def test_preempted_slices_are_made_again_and_the_run_ends_as_if_undisturbed(
    cloud, backend, config, tmp_path
):
    run = tmp_path / "run"
    assert main(["tpu", "create", "pod", *FLAGS[backend], "--poll=0"]) == 0
    launcher = launch(run, config)
    wait_for_checkpoint(run, launcher)
    lost = hosts(cloud)[2]
    preempt(lost, {"cloud_tpu": "PREEMPTED", "compute_engine": "TERMINATED"}[backend])
    said = finish(launcher)
    assert "pod was preempted; creating it again" in said
    assert "pod: done; it is there, and costs" in said.splitlines()[-1]
    assert (run / "DONE").exists()
    pip = (cloud / hosts(cloud)[3] / "pip.log").read_text()
    assert "/constraints.txt --editable" in pip
    assert "tpu]" in pip
    created = [line for line in (cloud / "calls.log").read_text().splitlines() if "create" in line]
    assert len(created) % 2 == 0
    assert created[: len(created) // 2] == created[len(created) // 2 :]
    assert_undisturbed(run, config, tmp_path)


def test_check_measures_hosts_that_find_each_other(cloud, capsys, tmp_path):
    assert main(["tpu", "create", "pod", *FLAGS["cloud_tpu"], "--poll=0"]) == 0
    assert main(["tpu", "check", "pod", f"--workdir={tmp_path / 'bucket'}"]) == 1
    table = capsys.readouterr().out.splitlines()
    rows = [line for line in table if line.startswith("pod-w-")]
    # Four hosts of one device each, where a v4-32 has four; everything else is well.
    assert [row.split("  ")[-1].strip() for row in rows] == ["1 of 4 devices"] * 4
    assert len(rows) == 4


def test_a_host_that_is_cut_off_in_a_save_is_named_and_the_run_ends_as_if_undisturbed(
    cloud, config, tmp_path, monkeypatch
):
    """A host whose network is gone neither answers nor fails; the launcher is never silent."""
    if not fake_network.is_possible():
        pytest.skip("network namespaces need root and iproute2")
    monkeypatch.setenv("FAKE_GCLOUD_NETWORK", "1")
    in_cloud("fake_gcloud.fake_network.make()")
    try:
        run = tmp_path / "run"
        assert main(["tpu", "create", "pod", *FLAGS["cloud_tpu"], "--poll=0"]) == 0
        launcher = launch(run, config)
        wait_for_checkpoint(run, launcher)
        in_cloud("fake_gcloud.fake_network.cut('pod-w-2')")
        lines, silences = [], []
        while "does not answer" not in "".join(lines[-1:]):
            started = time.monotonic()
            lines.append(launcher.stderr.readline())
            silences.append(time.monotonic() - started)
            assert lines[-1], lines
        assert max(silences) < 60
        assert "pod-w-2 does not answer" in lines[-1]
        preempt("pod-w-1", "PREEMPTED")
        said = finish(launcher)
        assert "pod was preempted; creating it again" in said
        assert (run / "DONE").exists()
        assert_undisturbed(run, config, tmp_path)
    finally:
        in_cloud("fake_gcloud.fake_network.remove()")
