"""Runs on four hosts from create to done: preempted, cut off from the network, on each backend.

Every host is a process of this machine. Cut-off hosts need network namespaces, and so root.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import fake_network
import numpy as np
import pytest

from vit_jax.__main__ import main

ROOT = Path(__file__).parent.parent.parent
STEPS = 12

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="copies a git checkout to the hosts"),
]

FLAGS = {
    "cloud_tpu": ["--type=v4-32", "--zone=z", "--spot"],
    "compute_engine": ["--backend=compute-engine", "--type=v6e-16", "--zone=us-east5-a",
                       "--project=p", "--spot"],
}  # fmt: skip
TWO_SLICES = {  # Of two hosts each.
    "compute_engine": ["--backend=compute-engine", "--type=v5p-16", "--zone=us-east5-a",
                       "--project=p", "--spot", "--slices=2"],
    "gke": ["--backend=gke", "--type=v5p-16", "--zone=us-east5-a", "--location=us-east5",
            "--cluster=c", "--image=i", "--spot", "--slices=2"],
}  # fmt: skip


@pytest.fixture
def config(digits_npz):
    return [
        f"--config=tests/tiny.py:npz={digits_npz},steps={STEPS}",
        "--config.checkpoint.every=1",
        "--config.eval.every=3",
    ]


class Launcher:
    """`tpu train` in a process of its own, of which every line is kept, and the longest silence."""

    started: ClassVar = []

    def __init__(self, run, config):
        command = [sys.executable, "-m", "vit_jax", "tpu", "train", "pod", f"--workdir={run}"]
        self.process = subprocess.Popen(
            [*command, *config, "--poll=4"], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        self.started.append(self.process)
        self.lines, self.silence = [], 0.0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        last = time.monotonic()
        for line in self.process.stderr:
            self.lines.append(line)
            last, before = time.monotonic(), last
            self.silence = max(self.silence, last - before)
        self.silence = max(self.silence, time.monotonic() - last)  # After its last line, too.

    def wait_for(self, is_true, seconds=400):
        deadline = time.monotonic() + seconds
        while not is_true():
            assert self.process.poll() is None, self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.02)

    def wait(self, seconds=900):
        self.process.wait(seconds)
        self._reader.join()

    def finish(self):
        """Returns what it said until the run was done."""
        self.wait()
        assert self.process.returncode == 0, self.lines
        assert self.silence < 60
        assert "pod: done; it is there, and costs" in self.lines[-1]
        return "".join(self.lines)


@pytest.fixture(autouse=True)
def ends_launchers():
    yield
    while Launcher.started:
        Launcher.started.pop().kill()


def has_saved(run, *steps):
    """Returns a question: is a checkpoint of one of these steps there, or being written?"""
    return lambda: any(path.name.split(".")[0] in steps for path in run.glob("checkpoints/*"))


def hosts(cloud):
    found = json.loads((cloud / "nodes.json").read_text())
    return [host for entry in found.values() for host in entry["hosts"]]


def in_cloud(code):
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", f"import fake_gcloud; {code}"], cwd=here, check=True)


def kill(host):
    in_cloud(f"fake_gcloud.kill_host({host!r})")


def preempt(host, state):
    """Kills a host, and lets the cloud say so."""
    kill(host)
    in_cloud(f"fake_gcloud.set_state({host!r}, {state!r})")


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
    launcher = Launcher(run, config)
    launcher.wait_for(has_saved(run, "2", "3"))
    lost = hosts(cloud)[2]
    preempt(lost, {"cloud_tpu": "PREEMPTED", "compute_engine": "TERMINATED"}[backend])
    said = launcher.finish()
    assert "pod was preempted; creating it again" in said
    assert (run / "DONE").exists()
    pip = (cloud / hosts(cloud)[3] / "pip.log").read_text()
    assert "/constraints.txt --editable" in pip
    assert "tpu]" in pip
    created = [line for line in (cloud / "calls.log").read_text().splitlines() if "create" in line]
    assert len(created) % 2 == 0
    assert created[: len(created) // 2] == created[len(created) // 2 :]
    assert_undisturbed(run, config, tmp_path)


@pytest.fixture
def network(monkeypatch):
    """A network of hosts that can be cut off: neither do they answer then nor do they fail."""
    if not fake_network.is_possible():
        pytest.skip("network namespaces need root and iproute2")
    monkeypatch.setenv("FAKE_GCLOUD_NETWORK", "1")
    fake_network.make()
    yield fake_network
    fake_network.remove()


def measured(capsys, tmp_path):
    """Returns the verdicts of `tpu check` on four hosts of one device each."""
    main(["tpu", "check", "pod", f"--workdir={tmp_path / 'bucket'}", "--poll=2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pod-")]
    return [row.split("  ")[-1].strip() for row in rows]


def test_check_measures_hosts_that_find_each_other(cloud, capsys, tmp_path):
    assert main(["tpu", "create", "pod", *FLAGS["cloud_tpu"], "--poll=0"]) == 0
    # A v4-32 has four on each host; everything else is well.
    assert measured(capsys, tmp_path) == ["1 of 4 devices"] * 4


def test_check_measures_the_pods_of_a_job_set(cloud, network, capsys, tmp_path):
    assert main(["tpu", "create", "pod", *TWO_SLICES["gke"], "--poll=0"]) == 0
    assert measured(capsys, tmp_path) == ["1 of 4 devices"] * 4
    assert not list((cloud / "kubernetes").iterdir())


@pytest.mark.parametrize("backend", ["cloud_tpu", "compute_engine"])
def test_a_host_that_is_cut_off_in_a_save_is_named_and_the_run_ends_as_if_undisturbed(
    cloud, network, backend, config, tmp_path
):
    """On Compute Engine the hosts of two slices find each other by what the launcher tells them."""
    run = tmp_path / "run"
    flags = TWO_SLICES.get(backend) or FLAGS[backend]
    assert main(["tpu", "create", "pod", *flags, "--poll=0"]) == 0
    launcher = Launcher(run, config)
    launcher.wait_for(has_saved(run, "2", "3"))
    _, second, third, _ = hosts(cloud)
    network.cut(third)
    launcher.wait_for(lambda: f"{third} does not answer" in launcher.lines[-1])
    preempt(second, {"cloud_tpu": "PREEMPTED", "compute_engine": "TERMINATED"}[backend])
    assert "pod was preempted; creating it again" in launcher.finish()
    assert (run / "DONE").exists()
    assert_undisturbed(run, config, tmp_path)


RUN_SH = """#!/bin/bash
[[ $1 == install ]] || while :; do echo "step $((++n))"; sleep 1; done
"""


def break_host(network, host, way):
    if way == "cut off":
        return network.cut(host.name)
    # Every command asks for the name of its host.
    (host / "bin/hostname").write_text(f"#!/bin/sh\nsleep {way}\necho {host.name}\n")


@pytest.mark.parametrize("way", ["cut off", "1000", "25"])  # Or that many seconds for an answer.
def test_a_watcher_is_never_silent_for_a_minute_whatever_a_host_does(cloud, network, way, tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "run.sh").write_text(RUN_SH)
    (repository / "run.sh").chmod(0o755)
    git = ["git", "-C", repository, "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init"], ["add", "."], ["commit", "-m", "m"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert main(["tpu", "create", "pod", *FLAGS["cloud_tpu"], "--poll=0"]) == 0
    pinned = ["--config=c.py", f"--commit={commit}", f"--repository={repository}"]
    launcher = Launcher(tmp_path / "run", pinned)
    launcher.wait_for(lambda: "pod-w-0: step" in "".join(launcher.lines))
    break_host(network, cloud / "pod-w-2", way)
    time.sleep(150)
    assert launcher.process.poll() is None, launcher.lines
    launcher.process.terminate()
    launcher.wait()
    for host in hosts(cloud):
        kill(host)
    assert launcher.silence < 60
    assert ("pod-w-2 does not answer" in "".join(launcher.lines)) == (way != "25")


def test_kubernetes_starts_a_run_again_that_ends_as_if_undisturbed(
    cloud, network, config, tmp_path
):
    """The launcher follows; a pod is cut off in a save, and another one's node is taken away."""
    run = tmp_path / "run"
    assert main(["tpu", "create", "pod", *TWO_SLICES["gke"], "--poll=0"]) == 0
    launcher = Launcher(run, config)
    launcher.wait_for(has_saved(run, "2", "3"))
    pods = cloud / "kubernetes/pod"
    network.cut("pod-slice-1-0")
    # Each pod starts its own run again, which waits for the lost one until its node is given up.
    launcher.wait_for(lambda: "starting again" in (pods / "pod-slice-0-0.log").read_text())
    (pods / "pod-slice-1-0.evicted").write_text("unreachable")
    launcher.wait_for(lambda: "pod: started again 1 times\n" in launcher.lines)
    launcher.wait_for(has_saved(run, "6", "7"))
    (pods / "pod-slice-0-1.evicted").touch()
    assert "pod: started again 2 times" in launcher.finish()
    assert (run / "DONE").exists()
    assert_undisturbed(run, config, tmp_path)
    assert main(["tpu", "delete", "pod"]) == 0
    assert not list((cloud / "kubernetes").iterdir())
    assert not list((cloud / "pools").iterdir())
