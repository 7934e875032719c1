"""A fake `gcloud` and `kubectl` on the PATH."""

import socket
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
ALL_PERMISSIONS = """{"permissions": ["storage.buckets.get", "storage.objects.create",
  "storage.objects.delete", "storage.objects.get", "storage.objects.list"]}"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The folder of a fake Cloud, empty at first."""
    root = tmp_path / "cloud"
    tools = root / "tools"
    tools.mkdir(parents=True)
    # Without what `apply` alone needs, Python's site packages, they start sooner.
    for name in ("gcloud", "kubectl"):
        run = f'exec {sys.executable} "$quick" -E {HERE}/fake_{name}.py "$@"'
        script = f'#!/bin/sh\nquick=-S; [ "$1" != apply ] || quick=-q\n{run}\n'
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    (root / "permissions.json").write_text(ALL_PERMISSIONS)
    monkeypatch.setenv("FAKE_GCLOUD", str(root))
    monkeypatch.setenv("FAKE_GCLOUD_PORT", str(free_port()))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(root / "config"))
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return root


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
