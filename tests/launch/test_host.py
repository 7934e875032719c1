"""`host.sh` installs packages, refuses what would stop a run, starts and stops."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax.launch.hosts import HOST_SCRIPT


@pytest.fixture
def host(cloud, monkeypatch):
    """`host(action, ...)` runs `host.sh pod ACTION ...` on a fake host; returns what came of it."""
    monkeypatch.setenv("FAKE_GCLOUD_HOSTS", "1")
    made = gcloud(cloud, "create", "pod", "--accelerator-type=v4-8", "--version=v")
    assert made.returncode == 0, made.stderr
    home = cloud / "pod-w-0"
    (home / "host.sh").write_text(HOST_SCRIPT.read_text())

    def run(*arguments):
        return gcloud(cloud, "ssh", "pod", "--worker=0", f"--command={' '.join(arguments)}")

    run.home = home
    return run


def gcloud(cloud, *arguments):
    command = [cloud / "tools/gcloud", "compute", "tpus", "tpu-vm", *arguments, "--zone=z"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def repository(folder, script):
    """A git repository with nothing but a `run.sh`."""
    folder.mkdir()
    (folder / "run.sh").write_text(f"#!/bin/bash\n{script}\n")
    (folder / "run.sh").chmod(0o755)
    for arguments in (
        ["init"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "m"],
    ):
        subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True)
    done = subprocess.run(
        ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_pinned_commit_is_installed_with_the_tpu_extra(host, tmp_path):
    script = 'env | grep VIT_JAX | sort >"$HOME/env"; echo "$@" >>"$HOME/env"'
    commit = repository(tmp_path / "repository", script)
    done = host("bash host.sh pod prepare", str(tmp_path / "repository"), commit)
    assert done.returncode == 0, done.stderr
    assert (host.home / "env").read_text().splitlines() == [
        "VIT_JAX_EXTRAS=tpu",
        f"VIT_JAX_PYTHON={host.home}/bin/python3.13",
        f"VIT_JAX_VENV={host.home}/vit_jax_runs/pod/venv",
        "install",
    ]
    done = host("bash host.sh pod prepare", str(tmp_path / "repository"), "0" * 40)
    assert done.returncode == 2
    assert f"error: pod-w-0: commit {'0' * 40} is not in" in done.stderr


def test_a_copy_of_the_code_makes_way_for_a_commit(host, tmp_path):
    commit = repository(tmp_path / "repository", "echo one")
    code = host.home / "vit_jax_runs/pod/code"
    code.mkdir(parents=True)
    (code / "run.sh").write_text("the copy's")
    assert host("bash host.sh pod prepare", str(tmp_path / "repository"), commit).returncode == 0
    assert "echo one" in (code / "run.sh").read_text()
    other = repository(tmp_path / "other", "echo two")
    assert host("bash host.sh pod prepare", str(tmp_path / "other"), other).returncode == 0
    assert "echo two" in (code / "run.sh").read_text()


def test_two_calls_do_not_install_at_the_same_time(host, tmp_path):
    """The first may be that of a launcher that was interrupted."""
    script = '[[ ! -e $HOME/busy ]] && touch "$HOME/busy" && sleep 0.3 && rm "$HOME/busy"'
    commit = repository(tmp_path / "repository", script)
    prepare = shlex.join(
        ["bash", "host.sh", "pod", "prepare", str(tmp_path / "repository"), commit]
    )
    both = host(f"{prepare} & first=$!; {prepare} && wait $first")
    assert both.returncode == 0, both.stderr


OLD_PYTHON = """#!/bin/bash
case "$*" in
  -c*) exit 1 ;;
  *"pip install"*) {pip} ;;
  *"uv python find"*) echo {found} ;;
esac
"""


def make_python_old(host, pip):
    for name in ("3.11", "3.12", "3.13"):
        (host.home / f"bin/python{name}").unlink()
    text = OLD_PYTHON.format(pip=pip, found=host.home / "new/python3.12")
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (host.home / "bin" / name).write_text(text)
        (host.home / "bin" / name).chmod(0o755)


def test_an_image_with_an_old_python_gets_a_new_one(host, tmp_path):
    commit = repository(tmp_path / "repository", 'echo "$VIT_JAX_PYTHON" >"$HOME/used"')
    make_python_old(host, pip="true")
    done = host("bash host.sh pod prepare", str(tmp_path / "repository"), commit)
    assert done.returncode == 0, done.stderr
    assert (host.home / "used").read_text().strip() == f"{host.home}/new/python3.12"


@pytest.mark.parametrize(
    ("pip", "way"),
    [
        ('[[ "$*" == *--break-system-packages* ]]', "python3"),  # As Ubuntu 24.04 (PEP 668).
        ("exit 1", "uv"),  # Such as a Python without pip.
    ],
)
def test_a_python_that_takes_no_packages_gets_uv_in_another_way(host, tmp_path, pip, way):
    commit = repository(tmp_path / "repository", 'echo "$VIT_JAX_PYTHON" >"$HOME/used"')
    make_python_old(host, pip=pip)
    uv = OLD_PYTHON.format(pip="exit 1", found="from-uv").replace("uv python", "python")
    installer = f"mkdir -p $UV_INSTALL_DIR; cat >$UV_INSTALL_DIR/uv <<'END'\n{uv}\nEND\n"
    (host.home / "installer").write_text(installer + "chmod +x $UV_INSTALL_DIR/uv\n")
    (host.home / "bin/curl").write_text(f'#!/bin/sh\ncat "{host.home}/installer"\n')
    done = host("bash host.sh pod prepare", str(tmp_path / "repository"), commit)
    assert done.returncode == 0, done.stderr
    expected = "from-uv" if way == "uv" else f"{host.home}/new/python3.12"
    assert (host.home / "used").read_text().strip() == expected


def test_without_a_way_to_a_new_python_it_says_what_is_missing(host, tmp_path):
    commit = repository(tmp_path / "repository", "true")
    make_python_old(host, pip="exit 1")
    done = host("bash host.sh pod prepare", str(tmp_path / "repository"), commit)
    assert done.returncode == 2
    assert "no Python 3.11 or newer" in done.stderr
    assert "Cloud NAT" in done.stderr


def test_a_bucket_that_may_be_written_passes(host):
    done = host("bash host.sh pod check gs://bucket/run")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_permission_names_the_role_that_has_it(host, cloud):
    held = {"permissions": ["storage.objects.get", "storage.objects.list"]}
    (cloud / "permissions.json").write_text(json.dumps(held))
    done = host("bash host.sh pod check gs://bucket/run")
    assert done.returncode == 2
    lacks = (
        "lacks storage.buckets.get storage.objects.create storage.objects.delete on gs://bucket."
    )
    assert lacks in done.stderr
    assert "--role=roles/storage.objectUser" in done.stderr
    assert "--role=roles/storage.legacyBucketReader" in done.stderr
    held["permissions"] += ["storage.objects.create", "storage.objects.delete"]
    (cloud / "permissions.json").write_text(json.dumps(held))
    told = host("bash host.sh pod check gs://bucket/run").stderr
    assert "lacks storage.buckets.get on gs://bucket." in told
    assert "objectUser" not in told
    (cloud / "permissions.json").unlink()
    assert "gs://bucket does not exist" in host("bash host.sh pod check gs://bucket/run").stderr


def test_the_process_that_holds_a_device_is_named(host, tmp_path):
    device = tmp_path / "accel0"
    device.touch()
    with device.open() as held:
        command = f"source host.sh; holders '{tmp_path}/accel*' /dev/nothing"
        found = host(command).stdout.split(maxsplit=2)
        assert not held.closed
    assert found[0] == str(os.getpid())
    assert Path(sys.executable).name in found[2]
    assert host(command).stdout == ""


def test_holders_are_looked_for_as_root_where_that_needs_no_password(host):
    (host.home / "bin/sudo").write_text(
        '#!/bin/bash\n[[ $1 == -n ]] || exit 1\nshift\necho "$1" >>"$HOME/as_root"\n"$@"\n'
    )
    (host.home / "bin/sudo").chmod(0o755)
    assert host("source host.sh; holders /dev/nothing").returncode == 0
    assert "find" in (host.home / "as_root").read_text().split()
    (host.home / "bin/sudo").write_text("#!/bin/sh\nexit 1\n")  # It asks for a password.
    assert host("source host.sh; holders /dev/nothing; echo looked").stdout == "looked\n"


def test_a_lock_that_another_user_left_is_removed_or_told(host, tmp_path):
    lock = tmp_path / "libtpu_lockfile"
    (host.home / "bin/id").write_text("#!/bin/sh\necho 4242\n")
    (host.home / "bin/id").chmod(0o755)
    command = f"source host.sh; holders() {{ :; }}; lockfile={lock}; check_tpu_is_free"
    lock.touch()
    assert host(command).returncode == 0
    assert not lock.exists()
    lock.mkdir()  # Which `rm -f` refuses, as it does a file of others.
    done = host(command)
    assert done.returncode == 2
    assert "so that libtpu cannot lock the TPU; remove it" in done.stderr


def run_of(host, script, files=()):
    """Puts a `run.sh` and other files where a prepared run has them, and starts it."""
    code = host.home / "vit_jax_runs/pod/code"
    code.mkdir(parents=True)
    for name, text in dict(files).items():
        (code / name).write_text(text)
    (code / "run.sh").write_text(f"#!/bin/bash\n{script}\n")
    (code / "run.sh").chmod(0o755)
    assert host("bash host.sh pod state").stdout == "pod-w-0 none\n"
    assert host("bash host.sh pod start --config=c --restarts=20").returncode == 0


def state_of(host, kind):
    deadline = time.monotonic() + 60
    while f" {kind}" not in (told := host("bash host.sh pod state").stdout):
        assert time.monotonic() < deadline, told
    return told.strip()


def test_a_run_that_ends_leaves_its_code_and_last_line_until_the_host_restarts(host):
    run_of(host, 'echo first; echo "last $*"; exit 75')
    assert state_of(host, "ended") == "pod-w-0 ended 75 last train --config=c --restarts=20"
    assert host("bash host.sh pod logs").stdout.splitlines()[0] == "first"
    assert host("bash host.sh pod arguments").stdout == "--config=c --restarts=20\n"
    folder = host.home / "vit_jax_runs/pod"
    (folder / "boot_id").write_text("of an earlier boot\n")
    assert host("bash host.sh pod state").stdout == "pod-w-0 none\n"
    (folder / "pid").write_text(str(os.getpid()))  # As another process may have it by now.
    assert host("bash host.sh pod state").stdout == "pod-w-0 none\n"
    assert host("bash host.sh pod stop").returncode == 0


def test_stop_lets_a_run_save_first(host):
    run_of(host, "trap 'echo saved; exit 75' TERM; echo going; while :; do sleep 0.05; done")
    while "going" not in state_of(host, "running"):
        continue
    started_twice = host("bash host.sh pod start --config=c")
    assert (started_twice.returncode, started_twice.stderr) == (0, "")
    assert host("bash host.sh pod stop").returncode == 0
    assert host("bash host.sh pod state").stdout == "pod-w-0 ended 75 stopped: saved\n"
    assert host("bash host.sh pod stop").returncode == 0  # Nothing left to stop.


SUPERVISED = """PYTHONPATH={root} exec {python} -c "
from vit_jax.launch import supervise
with supervise._Forwarding() as forwarding:
    forwarding.call(['bash', 'trainer.sh'])
"
"""


def command_line(pid):
    """The command line of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_stop_does_not_wait_for_ever_for_a_trainer_behind_its_supervisor(host):
    root = Path(__file__).parents[2]
    trainer = "trap '' TERM; echo going $$; while :; do sleep 0.05; done"
    run_of(host, SUPERVISED.format(root=root, python=sys.executable), {"trainer.sh": trainer})
    while "going" not in (told := state_of(host, "running")):
        continue
    pid = told.split()[-1]
    assert b"trainer.sh" in command_line(pid)
    assert host("VIT_JAX_STOP_SECONDS=0.5 bash host.sh pod stop").returncode == 0
    assert state_of(host, "none") == "pod-w-0 none"
    deadline = time.monotonic() + 60
    while command_line(pid):
        assert time.monotonic() < deadline


def test_unknown_actions_and_early_questions_are_errors(host):
    assert "unknown action fly" in host("bash host.sh pod fly").stderr
    assert "has not been started here" in host("bash host.sh pod logs").stderr
