"""A `gcloud` whose TPU hosts are folders, and whose ssh runs a command here as one of them.

What it keeps lies in $FAKE_GCLOUD: `nodes.json` (name → state, hosts) and, for each host, its home
folder `NODE-WORKER`. A host has a `python3` that makes virtual environments without installing
anything, a `hostname`, a `curl` that knows the metadata server and the bucket's permissions, and
the variables by which the processes of one run find each other.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(os.environ["FAKE_GCLOUD"])
NODES = ROOT / "nodes.json"
HOSTS = int(os.environ.get("FAKE_GCLOUD_HOSTS", "4"))

PYTHON = """#!/bin/bash
# Makes environments of this one, and notes what would be installed.
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$@" >>"$HOME/pip.log" ;;
  *) exec {python} "$@" ;;
esac
"""
CURL = """#!/bin/bash
case "${{@: -1}}" in
  */email) echo runner@project.iam.gserviceaccount.com ;;
  */token) echo '{{"access_token": "t0ken", "expires_in": 3599}}' ;;
  *testPermissions*) cat {root}/permissions.json ;;
  *) exit 22 ;;
esac
"""


def nodes():
    return json.loads(NODES.read_text()) if NODES.exists() else {}


def save(found):
    NODES.write_text(json.dumps(found))


def home(node, worker):
    return ROOT / f"{node}-{worker}"


def create(name, flags):
    count = int(flags.get("node-count", 1))
    names = [f"{flags['node-prefix']}-{i}" for i in range(count)] if count > 1 else [name]
    found = nodes()
    for rank, node in enumerate(names):
        for worker in range(HOSTS):
            make_host(node, worker)
        found[node] = {"state": "READY", "first": rank * HOSTS, "all": count * HOSTS}
    save(found)


def make_host(node, worker):
    tools = home(node, worker) / "bin"
    tools.mkdir(parents=True)
    scripts = {
        "python3": PYTHON.format(python=sys.executable),
        "curl": CURL.format(root=ROOT),
        "hostname": f"#!/bin/sh\necho {node}-w-{worker}\n",
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("3.11", "3.12", "3.13"):
        (tools / f"python{name}").symlink_to("python3")


def delete(name):
    found = nodes()
    for node in [node for node in found if node == name or node.startswith(f"{name}-")]:
        for worker in range(HOSTS):
            kill_host(node, worker)
            shutil.rmtree(home(node, worker))
        del found[node]
    save(found)


def kill_host(node, worker):
    """As when the power goes: every process that started in the host's home folder."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            if f"HOME={home(node, worker)}".encode() in variables:
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue


def ssh(node, flags):
    entry = nodes()[node]
    worker = flags["worker"]
    workers = range(HOSTS) if worker == "all" else [int(worker)]

    def on_host(worker):
        here = home(node, worker)
        variables = {
            "HOME": str(here),
            "PATH": f"{here / 'bin'}:/usr/bin:/bin",
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_PORT": os.environ["FAKE_GCLOUD_PORT"],
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_NTASKS": str(entry["all"]),
            "SLURM_PROCID": str(entry["first"] + worker),
            "SLURM_LOCALID": str(worker),
        }
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            variables[name] = os.environ.get(name, "")
        return subprocess.run(
            ["bash", "-c", flags["command"]], cwd=here, env=variables, check=False
        ).returncode

    with ThreadPoolExecutor(len(workers)) as pool:
        return max(pool.map(on_host, workers))


def main():
    log = " ".join(sys.argv[1:])
    with (ROOT / "calls.log").open("a") as file:
        file.write(log + "\n")
    _, _, kind, action, *rest = sys.argv[1:]
    names = [item for item in rest if not item.startswith("--")]
    flags = dict(item[2:].partition("=")[::2] for item in rest if item.startswith("--"))
    if action == "create":
        return create(names[0], flags)
    if action == "delete":
        return delete(names[0])
    found = nodes()
    if action == "describe":
        state = [
            entry["state"]
            for node, entry in found.items()
            if node == names[0] or node.startswith(f"{names[0]}-")
        ]
        if not state:
            print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
            return 1
        print({"READY": "ACTIVE"}.get(state[0], state[0]) if kind != "tpu-vm" else state[0])
        return 0
    if action == "scp":
        for file in names[:-1]:
            for worker in range(HOSTS):
                shutil.copy(file, home(names[-1].rstrip(":"), worker))
        return 0
    return ssh(names[0], flags)


if __name__ == "__main__":
    sys.exit(main())
