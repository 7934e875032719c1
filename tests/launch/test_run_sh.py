"""`run.sh`: environments that are missing, half made, or there. Nothing is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# Makes environments of itself and notes what it is asked for; `supported` tells of its version.
PYTHON = """#!/bin/bash
echo "$@" >>{calls}
case "$*" in
  "-m venv "*)
    mkdir -p "${{@: -1}}/bin"
    [[ $* != *--clear* ]] || rm -f "${{@: -1}}"/bin/*
    [[ -L ${{@: -1}}/bin/python ]] || cp --remove-destination "$0" "${{@: -1}}/bin/python" ;;
  "-m pip install"*) {pip} ;;
  "-c import sys; print"*) echo "{name}" ;;
  "-c import"*) exit {supported} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """`checkout(...)` runs `run.sh` in a copy whose only Python is a script that notes calls."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("run.sh", "setup.py", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    calls = tmp_path / "calls"
    tools = tmp_path / "tools"
    tools.mkdir()

    def run(*arguments, supported=True, name="3.12.1 /usr", pip="true", free_mib=9999, venv=""):
        python = tmp_path / "python"
        filled = {"supported": 0 if supported else 1, "name": name, "pip": pip}
        python.write_text(PYTHON.format(calls=calls, **filled))
        (tools / "df").write_text(f"#!/bin/bash\necho -e 'head\\nx 1 1 {free_mib} 1% /'\n")
        for script in (python, tools / "df"):
            script.chmod(0o755)
        calls.write_text("")
        return subprocess.run(
            [folder / "run.sh", *arguments],
            env={
                **os.environ,
                "VIT_JAX_PYTHON": str(python),
                "VIT_JAX_VENV": venv,
                "PATH": f"{tools}:/usr/bin:/bin",
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    run.calls = lambda: [line for line in calls.read_text().splitlines() if line[:2] == "-m"]
    run.venv = folder / ".venv"
    return run


def test_it_installs_once(checkout):
    assert checkout("models").returncode == 0
    made, install, command = checkout.calls()
    assert made == f"-m venv {checkout.venv}"
    root = checkout.venv.parent
    assert install.endswith(f"--constraint {root}/constraints.txt --editable {root}[train,text]")
    assert command == "-m vit_jax models"
    assert checkout("models").returncode == 0
    assert checkout.calls() == ["-m vit_jax models"]


def test_an_environment_that_was_cut_short_is_made_again(checkout):
    (checkout.venv / "bin").mkdir(parents=True)
    python = checkout.venv / "bin/python"
    python.write_text("#!/bin/bash\nexit 1  # No module named pip.\n")
    python.chmod(0o755)
    (checkout.venv / "kept").touch()
    assert checkout("install").returncode == 0
    assert checkout.calls()[0] == f"-m venv {checkout.venv}"
    assert (checkout.venv / "kept").exists()


def test_a_link_to_a_python_that_is_gone_does_not_stay(checkout):
    (checkout.venv / "bin").mkdir(parents=True)
    (checkout.venv / "bin/python").symlink_to("/nowhere/python3")
    assert checkout("models").returncode == 0
    assert checkout.calls()[-1] == "-m vit_jax models"


@pytest.mark.parametrize("fault", ["gone", "replaced"])
def test_an_environment_whose_python_is_gone_or_another_is_made_anew(checkout, fault):
    assert checkout("install").returncode == 0
    (checkout.venv / "pyvenv.cfg").touch()
    python = checkout.venv / "bin/python"
    if fault == "gone":
        python.unlink()
        python.symlink_to("/nowhere/python3")
    else:
        python.write_text(python.read_text().replace("3.12.1", "3.13.0"))
    assert checkout("install", name="3.13.0 /usr").returncode == 0
    made, install = [line for line in checkout.calls() if "pip --version" not in line]
    assert made == f"-m venv --clear {checkout.venv}"
    assert "pip install" in install
    assert checkout("models", name="3.13.0 /usr").returncode == 0
    assert checkout.calls() == ["-m vit_jax models"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"free_mib": 300}, "300 MiB of disk are free, 4000 are needed"),
        (
            {"pip": "echo 'ERROR: No matching distribution found for jax'; exit 1"},
            "the package index cannot be reached, or lacks a package; name a mirror with",
        ),
        ({"pip": "echo 'OSError: [Errno 28] No space left on device'; exit 1"}, "disk is full"),
        (
            {"pip": "echo \"by 'ProxyError('Cannot connect to proxy.'\"; exit 1"},
            "the proxy does not lead to the package index; correct HTTPS_PROXY, or unset it",
        ),
        (
            {"pip": "echo '[SSL: CERTIFICATE_VERIFY_FAILED] certificate'; exit 1"},
            "name the file of your proxy's certificates with PIP_CERT",
        ),
        ({"venv": "/dev/null/x"}, "/dev/null/x: this folder cannot be made; name another"),
    ],
)
def test_what_a_machine_lacks_is_told_in_one_line(checkout, options, line):
    done = checkout("install", **options)
    assert done.returncode == 2
    told = [one for one in done.stderr.splitlines() if not one.startswith("installing")]
    assert len(told) == 1
    assert line in told[0]


def test_the_larger_downloads_are_seen(checkout):
    pip = "echo 'Collecting jax'; echo '  Downloading jaxlib-1.whl (83.9 MB)'; echo 'Requirement'"
    assert checkout("install", pip=pip).stderr.splitlines() == [
        f"installing into {checkout.venv} (once; some minutes on a first run)",
        "  Downloading jaxlib-1.whl (83.9 MB)",
    ]
    assert "Requirement" in (checkout.venv / "install.log").read_text()


def test_a_relative_environment_lies_where_the_user_stands(checkout, tmp_path):
    assert checkout("test", venv="environments/a").returncode == 0
    assert checkout.calls()[0] == f"-m venv {tmp_path}/environments/a"


def test_a_python_that_makes_no_environments_is_not_taken(checkout):
    done = checkout("models", supported=False)
    assert done.returncode == 2
    assert "with venv found; install one (Debian: and python3-venv)" in done.stderr
    assert not checkout.venv.exists()
