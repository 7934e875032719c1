"""`./run.sh tpu`: the commands it gives, what it says to wrong ones, and a run from end to end."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import cloud_reference
import pytest

from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.launch import slices as slices_lib
from vit_jax.launch.archive import pack
from vit_jax.launch.fleet import SSH_FLAGS, ranges
from vit_jax.launch.slices import Slices
from vit_jax.version import commit_of

ROOT = Path(__file__).parent.parent.parent


def dry(capsys, *arguments):
    """The commands that a dry run prints, as lists of words."""
    action, *rest = arguments
    assert main(["tpu", action, "--dry-run", *rest]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    commands = [shlex.split(line) for line in printed.out.splitlines()]
    for command in commands:
        cloud_reference.check(command)
    return commands


CREATE = ["create", "pod", "--type=v5litepod-256", "--zone=us-west4-a"]
TRAIN = ["train", "pod", "--config=configs/digits.py", "--workdir=gs://bucket/run"]
ONE_HOST = ["create", "pod", "--type=v5litepod-8", "--zone=us-west4-a"]


def test_create_asks_for_one_host(cloud, capsys):
    create, look = dry(capsys, *ONE_HOST, "--project=p")
    assert create == [
        "gcloud", "compute", "tpus", "tpu-vm", "create", "pod",
        "--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite",
        "--zone=us-west4-a", "--quiet", "--project=p",
    ]  # fmt: skip
    assert look[4:6] == ["describe", "pod"]
    assert not list(cloud.glob("config/**/*.json"))  # Nothing happened.


def test_several_hosts_wait_in_a_queue(cloud, capsys):
    create, _ = dry(capsys, *CREATE)
    assert create[3:7] == ["queued-resources", "create", "pod", "--node-id=pod"]
    create, _ = dry(capsys, *CREATE, "--no-queued")
    assert create[3:5] == ["tpu-vm", "create"]
    create, _ = dry(capsys, *ONE_HOST, "--queued")
    assert create[3:5] == ["queued-resources", "create"]


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


def test_capacity_labels_and_disks_have_flags_and_everything_else_is_handed_on(cloud, capsys):
    create, _ = dry(
        capsys, *CREATE, "--reservation=r", "--provisioning-model=reservation-bound",
        "--max-run-duration=7d", "--labels=team=a,run=b", "--tags=t", "--autocheckpoint",
        "--data-disk=source=d,mode=read-only", "--data-disk=source=e", "--",
        "--valid-until-duration=6h", "--description=a b $(c)",
    )  # fmt: skip
    assert create[1:5] == ["alpha", "compute", "tpus", "queued-resources"]
    assert create[8:-3] == [
        "--accelerator-type=v5litepod-256", "--autocheckpoint-enabled", "--reservation=r",
        "--provisioning-model=reservation-bound", "--max-run-duration=7d", "--labels=team=a,run=b",
        "--tags=t", "--data-disk=source=d,mode=read-only", "--data-disk=source=e",
        "--valid-until-duration=6h", "--description=a b $(c)",
    ]  # fmt: skip


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
    assert {f"--version={version}", f"--runtime-version={version}"} & {*create}
    assert f"--accelerator-type={type_}" in create


@pytest.mark.parametrize(
    ("type_", "flags"),
    [
        ("v5e-256", ["--accelerator-type=v5litepod-256"]),
        ("v5e:4x4", ["--accelerator-type=v5litepod-16"]),
        ("v4:4x4x8", ["--accelerator-type=v4-256"]),
        ("v4:4x4x16", ["--type=v4", "--topology=4x4x16"]),  # No type has this shape.
    ],
)
def test_types_are_written_as_cloud_tpu_spells_them(cloud, capsys, type_, flags):
    create, _ = dry(capsys, "create", "pod", f"--type={type_}", "--zone=z")
    assert [word for word in create if "type=" in word or "topology=" in word] == flags


def test_a_generation_that_the_api_does_not_serve_is_told(cloud, capsys):
    wrong = ["tpu", "create", "pod", "--type=tpu7x-8", "--zone=z", "--backend=cloud-tpu"]
    assert main([*wrong, "--dry-run"]) == 2
    assert "does not serve tpu7x; use --backend=compute-engine or" in capsys.readouterr().err


def test_more_than_a_hundred_hosts_are_reached_in_ranges(cloud, capsys):
    commands = dry(capsys, *TRAIN, "--zone=z", "--type=v5p-2048")
    workers = [word for words in commands for word in words if word.startswith("--worker=")]
    assert {*workers} == {"--worker=0-99", "--worker=100-199", "--worker=200-255"}
    assert ranges(101) == ["0-99", "100"]  # gcloud refuses 100-100.


def test_hosts_behind_iap_are_reached_by_the_alpha_commands(cloud, capsys):
    commands = dry(capsys, *TRAIN, "--zone=z", "--iap")
    commands = [words for words in commands if words[0] == "gcloud"]
    reached = [words for words in commands if {"ssh", "scp"} & {*words}]
    assert all(words[1] == "alpha" and "--tunnel-through-iap" in words for words in reached)
    assert all("alpha" not in words for words in commands if "describe" in words)


def test_train_copies_the_code_checks_and_starts_every_host(cloud, capsys):
    look, archive, *commands = dry(capsys, *TRAIN, "--zone=z", "--config.seed=3")
    assert [command[4] for command in (look, *commands)] == [
        "describe", "scp", "ssh", "ssh", "ssh", "describe", "ssh",
    ]  # fmt: skip
    assert archive[-3:-1] == ["-m", "vit_jax.launch.archive"]
    assert archive[-1] in commands[0]
    assert all(set(SSH_FLAGS) < set(command) for command in commands if command[4] == "ssh")
    copied = commands[0][5:8]
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


def test_the_archive_is_packed_by_the_command_that_a_dry_run_prints(cloud, capsys, tmp_path):
    archive = dry(capsys, *TRAIN, "--zone=z")[1]
    small = tmp_path / "a checkout"
    for name in ("__init__.py", "errors.py", "version.py", "launch/__init__.py"):
        (small / "vit_jax" / name).parent.mkdir(parents=True, exist_ok=True)
        (small / "vit_jax" / name).write_text((ROOT / "vit_jax" / name).read_text())
    (small / "setup.cfg").write_text("")
    here = "vit_jax/launch/archive.py"
    (small / here).write_text((ROOT / here).read_text())
    tar = tmp_path / "new/pod.tgz"
    # An interpreter that lies inside the checkout stays where it is.
    words = [
        word if word == sys.executable else word.replace(str(ROOT), str(small))
        for word in archive[:-1]
    ]
    done = subprocess.run([*words, tar], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"error: {small} is no git checkout; clone the repository" in done.stderr
    subprocess.run(["git", "init", small], check=True, capture_output=True)
    subprocess.run([*words, tar], check=True, cwd=tmp_path)
    with tarfile.open(tar) as file:
        assert {here, ".commit"} < set(file.getnames())


def test_a_pinned_commit_is_cloned_by_the_hosts(cloud, capsys):
    commands = dry(capsys, *TRAIN, "--zone=z", "--commit=abc", "--repository=https://host/repo")
    assert not any("pod.tgz" in word for command in commands for word in command)
    assert any("prepare https://host/repo abc" in word for command in commands for word in command)


def test_what_was_created_is_known_by_its_name(cloud, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_GCLOUD_HOSTS", "1")
    monkeypatch.setenv("FAKE_GCLOUD_STATES", "WAITING_FOR_RESOURCES,PROVISIONING,READY")
    for waits_for in (["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], ["ACTIVE"]):
        assert main(["tpu", *ONE_HOST, "--slices=2", "--internal-ip", "--poll=0"]) == 0
        assert re.findall("pod: ([A-Z_]+)", capsys.readouterr().err) == waits_for
    # The second call, as after an interruption of the first, requests nothing.
    calls = (cloud / "calls.log").read_text().splitlines()
    assert len([call for call in calls if "queued-resources create" in call]) == 1
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


def test_an_illness_and_a_deletion_are_told(cloud, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_GCLOUD_HOSTS", "1")
    monkeypatch.setenv("FAKE_GCLOUD_DELETING", "1")
    assert main(["tpu", *ONE_HOST, "--poll=0"]) == 0
    code = "import fake_gcloud; fake_gcloud.set_state('pod-w-0', 'READY', 'TIMEOUT')"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
    assert main(["tpu", "status", "pod"]) == 0
    assert capsys.readouterr().out.splitlines() == ["pod: READY, TIMEOUT", "pod-w-0: none"]
    assert main(["tpu", "delete", "pod"]) == 0
    for state in ("DELETING", "ABSENT"):
        assert main(["tpu", "status", "pod", "--zone=us-west4-a"]) == 0
        assert capsys.readouterr().out == f"pod: {state}\n"


def test_a_group_is_being_deleted_and_then_absent(cloud, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_GCLOUD_DELETING", "2")
    group = ["--zone=us-east5-a", "--project=p", "--backend=compute-engine", "--type=v6e-8"]
    assert main(["tpu", "create", "pod", *group, "--poll=0"]) == 0
    assert main(["tpu", "delete", "pod"]) == 0
    for state in ("DELETING", "PENDING", "ABSENT"):  # Its hosts go first.
        assert main(["tpu", "status", "pod", *group]) == 0
        assert capsys.readouterr().out == f"pod: {state}\n"


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
        (["create", "pod", "--type=v5e-7", "--zone=z"], "--type='v5e-7' has no usual shape"),
        ([*CREATE, "--backend=clod-tpu"], "did you mean 'cloud_tpu'?"),
        ([*CREATE, "--provisioning-model=cheap"], "write one of standard, spot, flex-start"),
        (
            [*CREATE, "--spot", "--provisioning-model=reservation-bound", "--reservation=r"],
            "--spot and --provisioning-model=reservation-bound exclude each other",
        ),
        ([*CREATE, "--spot", "--provisioning-model=flex-start"], "exclude each other"),
        ([*CREATE, "--provisioning-model=flex-start", "--reservation=r"], "exclude each other"),
        ([*CREATE, "--", "--project=q"], "-- --project=q: write --project before the --"),
        ([*CREATE, "--poll=inf"], "--poll=inf: write seconds from 0 up"),
        ([*CREATE, "--", "pod2"], "-- pod2: only flags are handed on"),
        ([*CREATE, "--", "--topology=4x4"], "write --type before the --"),
        ([*CREATE, "--slices=0"], "--slices=0: write a number from 1 up"),
        ([*CREATE, "--poll=nan"], "--poll=nan: write seconds from 0 up"),
        ([*CREATE, "--cluster=c"], "--cluster is not for --backend=cloud-tpu"),
        ([*ONE_HOST, "--max-run-duration=7d"], "only for queued resources; add --queued"),
        ([*TRAIN[:2], "--zone=z", "--", "--labels=a=b"], "passes nothing on: --labels=a=b"),
        (["render", *TRAIN[1:], "--zone=z"], "has no manifest; write --backend=gke"),
        ([*CREATE, "--tpye=v4-8"], "--tpye"),
        ([*CREATE, "--config.seed=1"], "takes no --config.seed"),
        (["status", "pod"], "add --zone"),
        (["train", "pod", "--zone=z"], "--config is missing"),
        (["train", "pod", "--zone=z", "--config=configs/digits.py"], "--workdir is missing"),
        ([*TRAIN[:3], "--workdir=runs/here", "--zone=z"], "gs://BUCKET"),
        ([*TRAIN[:3], "--workdir=gs://", "--zone=z"], "--workdir=gs://: write gs://BUCKET"),
        (["check", "pod", "--zone=z", "--workdir=here"], "--workdir=here: write gs://BUCKET"),
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


@pytest.mark.parametrize("flag", ["--backend=gke", "--zone=other", "--project=q"])
def test_delete_does_not_forget_slices_that_lie_elsewhere(cloud, capsys, flag):
    slices_lib.remember(Slices("pod", "z", type="v4-8", project="p"))
    assert main(["tpu", "delete", "pod", flag]) == 2
    field = flag.partition("=")[0]
    assert f"error: there is a pod with {field}=" in capsys.readouterr().err
    assert slices_lib.recall("pod")
    assert not (cloud / "calls.log").exists()


def test_without_gcloud_it_says_where_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["tpu", *CREATE]) == 2
    assert "gcloud is not installed" in capsys.readouterr().err


BARE = """
import sys
from vit_jax.__main__ import main
dry = ["--zone=z", "--type=v4-8", "--dry-run"]
run = ["--config=configs/digits.py", "--workdir=gs://b/r"]
for action in ("create", "check", "logs", "status", "stop", "delete"):
    assert main(["tpu", action, "pod", *dry]) == 0
gke = ["--backend=gke", "--type=v6e-8", "--image=i"]
assert main(["tpu", "train", "pod", *dry, *run]) == main(["tpu", "render", "pod", *gke, *run]) == 0
for words in (["create"], ["create", "pod"], ["tran", "pod"], ["create", "pod", "--slices=x"],
              ["create", "pod", "--backend=x", *dry], ["create", "pod", "--type=v5e-7", "--zone=z"],
              ["train", "pod", "--zone=z"], ["status", "pod"]):
    assert main(["tpu", *words]) == 2
assert not {"jax", "numpy", "etils", "absl"} & {*sys.modules}
"""


def test_the_launcher_needs_nothing_but_python(cloud):
    """Neither to launch nor to tell of a mistake: a laptop may have no package installed."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", BARE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("error: ") for line in lines)


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
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "setup.cfg").write_text("")
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/big").write_text("left behind")
    (tmp_path / "gone.py").write_text("")
    git("add", "gone.py")
    (tmp_path / "gone.py").unlink()
    (tmp_path / "new.py").write_text("not yet added")
    pack(tmp_path, tmp_path / "runs/code.tgz")
    with tarfile.open(tmp_path / "runs/code.tgz") as tar:
        assert sorted(tar.getnames()) == [".commit", ".gitignore", "new.py", "setup.cfg"]
        assert tar.extractfile(".commit").read() == b""  # Nothing is committed yet.
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "m")
    pack(tmp_path, tmp_path / "runs/code.tgz")
    with tarfile.open(tmp_path / "runs/code.tgz") as tar:
        tar.extractall(tmp_path / "runs/copy", filter="data")
    assert commit_of(tmp_path / "runs/copy") == commit_of(tmp_path)
    assert commit_of(tmp_path).endswith("+")  # `gone.py` is gone.


def test_a_folder_that_another_checkout_ignores_is_not_packed(tmp_path):
    """As a package installed in the environment of somebody's project, of which git lists none."""
    subprocess.run(["git", "-C", tmp_path, "init"], check=True, capture_output=True)
    (tmp_path / ".gitignore").write_text(".venv\n")
    installed = tmp_path / ".venv/site-packages"
    installed.mkdir(parents=True)
    for name in ("module.py", "setup.cfg"):
        (installed / name).write_text("")
        with pytest.raises(UserError, match="site-packages is no git checkout"):
            pack(installed, tmp_path / "code.tgz")


@pytest.mark.parametrize("config", ["vit_s16_i1k:300", "configs/vit_s16_i1k.py:300"])
def test_a_recipe_is_named_as_for_train(cloud, capsys, config):
    commands = dry(capsys, *TRAIN[:2], f"--config={config}", TRAIN[3], "--zone=z", "--type=v4-8")
    assert any(f"--config={config}" in " ".join(command) for command in commands)


def test_an_installed_package_starts_what_an_image_or_a_commit_holds(
    cloud, capsys, tmp_path, monkeypatch
):
    """GKE runs an image, and hosts clone a commit; only a copy of the code needs a checkout."""
    monkeypatch.setattr("vit_jax.cli.commands.tpu.REPOSITORY", tmp_path)
    run = [*TRAIN, "--zone=z", "--type=v6e-8"]
    for given in (["--backend=gke", "--image=i"], ["--commit=abc", "--repository=https://r"]):
        assert main(["tpu", *run, *given, "--dry-run"]) == 0
    assert main(["tpu", *run, "--dry-run"]) == 2
    assert f"error: {tmp_path} is no git checkout; clone the" in capsys.readouterr().err


def test_sigterm_ends_what_the_launcher_runs(monkeypatch):
    monkeypatch.setattr("vit_jax.cli.parser.run", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["tpu", "create", "pod"]) == 75
