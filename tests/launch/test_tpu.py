"""`./run.sh tpu`: the commands it gives, what it says to wrong ones, and a run from end to end."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vit_jax.__main__ import main
from vit_jax.launch import tpu
from vit_jax.version import commit_of

ROOT = Path(__file__).parent.parent.parent
STEPS = 6


def dry(capsys, *arguments):
    """The commands that a dry run prints, as lists of words."""
    assert main(["tpu", *arguments, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return [shlex.split(line) for line in printed.out.splitlines()]


CREATE = ["create", "pod", "--type=v5litepod-256", "--zone=us-west4-a"]


def test_create_asks_for_one_slice(cloud, capsys):
    create, look = dry(capsys, *CREATE, "--project=p")
    assert create == [
        "gcloud", "compute", "tpus", "tpu-vm", "create", "pod",
        "--accelerator-type=v5litepod-256", "--version=v2-alpha-tpuv5-lite",
        "--zone=us-west4-a", "--quiet", "--project=p",
    ]  # fmt: skip
    assert look[4:6] == ["describe", "pod"]
    assert not list(cloud.glob("config/**/*.json"))  # Nothing happened.


def test_several_slices_wait_in_a_queue(cloud, capsys):
    create, _ = dry(
        capsys, *CREATE, "--slices=4", "--spot", "--internal-ip", "--network=n", "--subnetwork=s",
        "--service-account=a@b", "--version=special",
    )  # fmt: skip
    assert create[3:] == [
        "queued-resources", "create", "pod", "--node-count=4", "--node-prefix=pod",
        "--accelerator-type=v5litepod-256", "--spot", "--internal-ips", "--network=n",
        "--subnetwork=s", "--service-account=a@b", "--runtime-version=special",
        "--zone=us-west4-a", "--quiet",
    ]  # fmt: skip


def test_a_queued_slice_is_one_node(cloud, capsys):
    create, _ = dry(capsys, *CREATE, "--queued")
    assert create[3:7] == ["queued-resources", "create", "pod", "--node-id=pod"]


@pytest.mark.parametrize(
    ("type_", "version"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-64", "tpu-ubuntu2204-base"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_every_type_has_its_runtime(cloud, capsys, type_, version):
    create, _ = dry(capsys, "create", "pod", f"--type={type_}", "--zone=z")
    assert f"--version={version}" in create


def test_types_are_written_as_cloud_tpu_spells_them(cloud, capsys):
    create, _ = dry(capsys, "create", "pod", "--type=v5e-8", "--zone=z")
    assert "--accelerator-type=v5litepod-8" in create


def test_a_generation_that_the_api_does_not_serve_is_told(cloud, capsys):
    assert main(["tpu", "create", "pod", "--type=tpu7x-8", "--zone=z", "--dry-run"]) == 2
    assert "does not serve tpu7x; use GKE or Compute Engine" in capsys.readouterr().err


TRAIN = ["train", "pod", "--config=configs/digits.py", "--workdir=gs://bucket/run"]


def test_train_copies_the_code_checks_and_starts_every_host(cloud, capsys):
    commands = dry(capsys, *TRAIN, "--zone=z", "--config.seed=3")
    assert [command[4] for command in commands] == [
        "describe", "scp", "ssh", "ssh", "ssh", "describe", "ssh",
    ]  # fmt: skip
    copied = commands[1][5:8]
    assert [Path(name).name for name in copied] == ["host.sh", "pod.tgz", "pod:"]
    on_hosts = [
        word.removeprefix("--command=bash host.sh pod ")
        for command in commands
        for word in command
        if word.startswith("--command=")
    ]
    assert on_hosts[:-1] == [
        "prepare",
        "check gs://bucket/run",
        "start --restarts=20 --config=configs/digits.py --workdir=gs://bucket/run --config.seed=3",
    ]
    assert "bash host.sh pod state" in on_hosts[-1]
    assert all("--worker=all" in command for command in commands if command[4] == "ssh")


def test_a_pinned_commit_is_cloned_by_the_hosts(cloud, capsys):
    commands = dry(capsys, *TRAIN, "--zone=z", "--commit=abc", "--repository=https://host/repo")
    assert not any("pod.tgz" in word for command in commands for word in command)
    assert any("prepare https://host/repo abc" in word for command in commands for word in command)


def test_what_was_created_is_known_by_its_name(cloud, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_GCLOUD_HOSTS", "1")
    assert main(["tpu", *CREATE, "--slices=2", "--internal-ip", "--poll=0"]) == 0
    assert "pod: ACTIVE" in capsys.readouterr().err
    log, *_ = dry(capsys, "logs", "pod", "--slice=1", "--worker=0")
    assert log[4:7] == ["ssh", "pod-1", "--internal-ip"]
    assert "--zone=us-west4-a" in log
    assert main(["tpu", "status", "pod"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "pod: ACTIVE", "pod-0-w-0: none", "pod-1-w-0: none"
    ]  # fmt: skip
    assert main(["tpu", "delete", "pod"]) == 0
    assert main(["tpu", "status", "pod", "--zone=z"]) == 0
    assert "pod: ABSENT" in capsys.readouterr().out
    assert main(["tpu", *TRAIN]) == 2  # Forgotten with the slices.
    assert "add --zone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran", "pod"], "did you mean 'train'?"),
        (["create"], "NAME"),
        (["create", "../../x", "--type=v4-8", "--zone=z"], "is no name of a slice"),
        (["status", "Pod_1", "--zone=z"], "is no name of a slice"),
        (["delete", "-x"], "NAME"),
        (["create", "pod", "--zone=z"], "--type is missing"),
        (["create", "pod", "--type=v4-8"], "--zone is missing"),
        (["create", "pod", "--type=v9-8", "--zone=z", "--dry-run"], "add --version=NAME"),
        ([*CREATE, "--tpye=v4-8"], "--tpye"),
        ([*CREATE, "--config.seed=1"], "takes no --config.seed"),
        (["status", "pod"], "add --zone"),
        (["train", "pod", "--zone=z"], "--config is missing"),
        (["train", "pod", "--zone=z", "--config=configs/digits.py"], "--workdir is missing"),
        ([*TRAIN[:3], "--workdir=runs/here", "--zone=z"], "gs://BUCKET"),
        (["train", "pod", "--config=nope.py", TRAIN[3], "--zone=z"], "no such file"),
        ([*TRAIN, "--zone=z", "--commit=abc"], "go together"),
        ([*TRAIN, "--zone=z"], "python -m vit_jax tpu create it first"),
        (["logs", "pod", "--zone=z", "--slice=1"], "there are 1"),
    ],
)
def test_mistakes_are_told_in_one_line(cloud, capsys, arguments, message):
    assert main(["tpu", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_without_gcloud_it_says_where_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["tpu", *CREATE]) == 2
    assert "gcloud is not installed" in capsys.readouterr().err


def test_help_needs_no_installation(cloud):
    done = subprocess.run(
        [ROOT / "run.sh", "tpu", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "VIT_JAX_PYTHON": sys.executable, "VIT_JAX_VENV": "/nowhere"},
    )
    assert "create" in done.stdout
    assert "Start a run on all hosts" in done.stdout


def test_the_copy_holds_changed_files_and_no_ignored_ones(tmp_path):
    import tarfile

    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/big").write_text("left behind")
    (tmp_path / "gone.py").write_text("")
    git("add", "gone.py")
    (tmp_path / "gone.py").unlink()
    (tmp_path / "new.py").write_text("not yet added")
    tpu.pack(tmp_path, tmp_path / "runs/code.tgz")
    with tarfile.open(tmp_path / "runs/code.tgz") as tar:
        assert sorted(tar.getnames()) == [".commit", ".gitignore", "new.py"]
        assert tar.extractfile(".commit").read() == b""  # Nothing is committed yet.
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "m")
    tpu.pack(tmp_path, tmp_path / "runs/code.tgz")
    with tarfile.open(tmp_path / "runs/code.tgz") as tar:
        tar.extractall(tmp_path / "runs/copy", filter="data")
    assert commit_of(tmp_path / "runs/copy") == commit_of(tmp_path)
    assert commit_of(tmp_path).endswith("+")  # `gone.py` is gone.


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="copies a git checkout to the hosts")
@pytest.mark.soak
def test_a_preempted_slice_is_made_again_and_the_run_ends_as_if_undisturbed(
    cloud, digits_npz, tmp_path
):
    """Four hosts, each a process of this machine; one loses its power, and Cloud TPU says so."""
    run = tmp_path / "run"
    config = [
        f"--config=tests/tiny.py:npz={digits_npz},steps={STEPS}",
        "--config.checkpoint.every=1",
        "--config.eval.every=3",
    ]
    assert main(["tpu", "create", "pod", "--type=v4-32", "--zone=z", "--spot", "--poll=0"]) == 0
    launcher = subprocess.Popen(
        [sys.executable, "-m", "vit_jax", "tpu", "train", "pod", f"--workdir={run}", *config,
         "--poll=0.3"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_checkpoint(run, launcher)
    preempt(cloud, "pod", worker=2)
    _, said = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, said
    assert "pod was preempted; creating it again" in said
    assert "pod: done; it is there, and costs" in said.splitlines()[-1]
    assert (run / "DONE").exists()

    pip = (cloud / "pod-3/pip.log").read_text()
    assert "--constraint constraints.txt --editable .[tpu]" in pip
    created = [line for line in (cloud / "calls.log").read_text().splitlines() if "create" in line]
    assert len(created) == 2
    assert created[0] == created[1]

    alone = tmp_path / "alone"
    subprocess.run(
        [sys.executable, "-m", "vit_jax", "train", f"--workdir={alone}", *config],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, check=True, capture_output=True,
    )  # fmt: skip
    disturbed, undisturbed = losses(run), losses(alone)
    assert list(disturbed) == list(undisturbed) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(disturbed.values()), list(undisturbed.values()), rtol=2e-5)


def wait_for_checkpoint(run, launcher):
    deadline = time.monotonic() + 400
    while not any(path.name in ("2", "3") for path in run.glob("checkpoints/*")):
        assert launcher.poll() is None, launcher.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def preempt(cloud, node, worker):
    code = f"import fake_gcloud; fake_gcloud.kill_host({node!r}, {worker})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
    found = json.loads((cloud / "nodes.json").read_text())
    found[node]["state"] = "PREEMPTED"
    (cloud / "nodes.json").write_text(json.dumps(found))


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
