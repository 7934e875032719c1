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
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-c import"*) exit {supported} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """`checkout(...)` runs `run.sh` in a copy whose only Python is a script that notes calls."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("run.sh", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    calls = tmp_path / "calls"

    def run(*arguments, supported=True):
        python = tmp_path / "python"
        python.write_text(PYTHON.format(calls=calls, supported=0 if supported else 1))
        python.chmod(0o755)
        calls.write_text("")
        return subprocess.run(
            [folder / "run.sh", *arguments],
            env={**os.environ, "VIT_JAX_PYTHON": str(python)},
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
    assert made == "-m venv .venv"
    assert install.endswith("--constraint constraints.txt --editable .")
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
    assert checkout.calls()[0] == "-m venv .venv"
    assert (checkout.venv / "kept").exists()


def test_a_python_that_makes_no_environments_is_not_taken(checkout):
    done = checkout("models", supported=False)
    assert done.returncode == 2
    assert "with venv found; install one (Debian: and python3-venv)" in done.stderr
    assert not checkout.venv.exists()
