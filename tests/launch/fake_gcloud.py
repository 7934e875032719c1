"""A strict `gcloud` whose TPU hosts are folders, and whose ssh runs a command here as one of them.

It refuses what the public reference lacks (`cloud_reference.py`). What it keeps lies in the folder
$FAKE_GCLOUD: `nodes.json` (name → states, hosts) and, for each host, its home folder. A slice that
is new goes through the states of $FAKE_GCLOUD_STATES, one a look; one that is deleted is DELETING
for $FAKE_GCLOUD_DELETING looks, as others see it while gcloud waits for its end. A host has a
`python3` that makes virtual environments without installing anything, a `hostname`, a `curl` that
knows the metadata server and the bucket's permissions, and the variables by which the processes of
one run find each other.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
import fake_network  # noqa: E402
from cloud_reference import Refused, check  # noqa: E402

ROOT = Path(os.environ["FAKE_GCLOUD"])
NODES = ROOT / "nodes.json"
HOSTS = int(os.environ.get("FAKE_GCLOUD_HOSTS", "4"))
DELETING_LOOKS = int(os.environ.get("FAKE_GCLOUD_DELETING", "0"))

PYTHON = """#!/bin/bash
# Makes environments of this one, and notes what would be installed.
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$@" >>"$HOME/pip.log" ;;
  *)
    # As JAX counts the processes of several slices (jax/_src/clusters/cloud_tpu_cluster.py).
    if [[ -n ${{MEGASCALE_NUM_SLICES:-}} ]]; then
      export SLURM_STEP_NODELIST=${{MEGASCALE_COORDINATOR_ADDRESS%:*}}
      export SLURM_PROCID=$((MEGASCALE_SLICE_ID * SLURM_NTASKS + SLURM_PROCID))
      export SLURM_NTASKS=$((MEGASCALE_NUM_SLICES * SLURM_NTASKS))
    fi
    exec {python} "$@" ;;
esac
"""
CURL = """#!/bin/bash
case "${{@: -1}}" in
  */email) echo runner@project.iam.gserviceaccount.com ;;
  */token) echo '{{"access_token": "t0ken", "expires_in": 3599}}' ;;
  */agent-worker-number) echo {worker} ;;
  */worker-network-endpoints) echo {endpoints} ;;
  *testPermissions*) cat {root}/permissions.json ;;
  *) exit 22 ;;
esac
"""


def nodes():
    return json.loads(NODES.read_text()) if NODES.exists() else {}


def save(found):
    NODES.write_text(json.dumps(found))


def home(host):
    return ROOT / host


def make_slice(first, everybody, hosts, machine=None, endpoint="unknown:unknown:{}"):
    """One slice of which this is the `first` process of `everybody`.

    machine: the number of its first machine in the network, if that is another one.
    endpoint: the form in which the metadata of a host tell the address of another.
    """
    machines = range(first if machine is None else machine, 1 << 30)
    addresses = [fake_network.address(number) for number, _ in zip(machines, hosts, strict=False)]
    if not fake_network.is_used():
        addresses = ["127.0.0.1"] * len(hosts)
    for worker, host in enumerate(hosts):
        make_host(host, worker, [endpoint.format(address) for address in addresses])
        if fake_network.is_used():
            fake_network.connect(host, machines[worker])
    states = os.environ.get("FAKE_GCLOUD_STATES", "READY").split(",")
    entry = {"states": states, "health": "HEALTHY", "hosts": hosts}
    return {**entry, "first": first, "all": everybody}


def make_host(host, worker, endpoints):
    tools = home(host) / "bin"
    tools.mkdir(parents=True)
    scripts = {
        "python3": PYTHON.format(python=sys.executable),
        "curl": CURL.format(root=ROOT, worker=worker, endpoints=",".join(endpoints)),
        "hostname": f"#!/bin/sh\necho {host}\n",
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("3.11", "3.12", "3.13"):
        (tools / f"python{name}").symlink_to("python3")


def create_tpus(name, flags):
    count = int(flags.get("node-count", ["1"])[0])
    names = [f"{flags['node-prefix'][0]}-{i}" for i in range(count)] if count > 1 else [name]
    found = nodes()
    for rank, node in enumerate(names):
        hosts = [f"{node}-w-{worker}" for worker in range(HOSTS)]
        found[node] = make_slice(rank * HOSTS, count * HOSTS, hosts)
    save(found)


def create_group(name, flags):
    """A managed instance group; its hosts have names that do not tell their numbers."""
    found = nodes()
    count = int(flags["size"][0])
    number = name.rpartition("-")[2]
    rank = int(number) if number.isdecimal() else 0
    hosts = [f"{name}-{'zyxwvuts'[worker]}bcd" for worker in range(count)]
    # Nothing but what the launcher says tells its hosts of the other slices.
    found[name] = make_slice(0, count, hosts, rank * count, "{}")
    save(found)


def delete(name):
    found = nodes()
    mine = [node for node in found if node == name or node.startswith(f"{name}-")]
    if not mine:
        return not_found(name)
    for node in mine:
        for host in found[node]["hosts"]:
            kill_host(host)
            shutil.rmtree(home(host))
        found[node] |= {"hosts": [], "ending": found[node]["hosts"]}
        found[node]["states"] = ["DELETING"] * DELETING_LOOKS + [None]
        if not DELETING_LOOKS:
            del found[node]
    save(found)
    return 0


def kill_host(host):
    """As when the power goes: every process that started in the host's home folder."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            if f"HOME={home(host)}".encode() in variables:
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue


def set_state(host, state, health="HEALTHY"):
    """Lets the cloud say this of the slice that a host is of."""
    found = nodes()
    for entry in found.values():
        if host in entry["hosts"]:
            entry |= {"states": [state], "health": health}
    save(found)


def state_of(name):
    """The state of the slices of a name; a look moves them on to the next."""
    found = nodes()
    mine = [node for node in found if node == name or node.startswith(f"{name}-")]
    states = [found[node]["states"][0] for node in mine]
    for node in mine:
        if len(found[node]["states"]) > 1:
            found[node]["states"].pop(0)
        if found[node]["states"][0] is None:
            del found[node]
    save(found)
    return states[0] if states else None


def ssh(hosts, command):
    first = fake_network.address(0) if fake_network.is_used() else "127.0.0.1"
    places = {host: entry for entry in nodes().values() for host in entry["hosts"]}

    def on_host(host):
        here, entry = home(host), places[host]
        worker = entry["hosts"].index(host)
        variables = {
            "HOME": str(here),
            "PATH": f"{here / 'bin'}:/usr/bin:/bin",
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_PORT": os.environ["FAKE_GCLOUD_PORT"],
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": first,
            "SLURM_NTASKS": str(entry["all"]),
            "SLURM_PROCID": str(entry["first"] + worker),
            "SLURM_LOCALID": str(worker),
        }
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            variables[name] = os.environ.get(name, "")
        before = []
        if fake_network.is_used():
            before = fake_network.inside(host)
            while fake_network.is_cut(host):  # As gcloud, which tries again.
                time.sleep(1)
        return subprocess.run(
            [*before, "bash", "-c", command], cwd=here, env=variables, check=False
        ).returncode

    with ThreadPoolExecutor(len(hosts)) as pool:
        return max(pool.map(on_host, hosts))


def scp(files, hosts):
    for file in files:
        for host in hosts:
            shutil.copy(file, home(host))
    return 0


def workers(node, flags):
    hosts = nodes()[node]["hosts"]
    worker = flags.get("worker", ["0"])[0]
    if worker == "all":
        return hosts
    first, _, last = worker.partition("-")
    return hosts[int(first) : int(last or first) + 1]


def not_found(name):
    print(f"ERROR: (gcloud) NOT_FOUND: The resource {name!r} was not found", file=sys.stderr)
    return 1


def tpus(kind, action, names, flags):
    if action == "create":
        return create_tpus(names[0], flags)
    if action == "delete":
        return delete(names[0])
    if action == "scp":
        return scp(names[:-1], workers(names[-1].rstrip(":"), flags))
    if action == "ssh":
        return ssh(workers(names[0], flags), flags["command"][0])
    state = state_of(names[0])
    if state is None:
        return not_found(names[0])
    if kind == "queued-resources":
        print({"READY": "ACTIVE"}.get(state, state))
    else:
        health = nodes().get(names[0], {}).get("health", "HEALTHY")
        print(f"{state}\t{health}")
    return 0


def compute_engine(name, names, flags):
    if name == "compute ssh":
        return ssh(names, flags["command"][0])
    if name == "compute scp":
        return scp(names[:-1], [names[-1].rstrip(":")])
    if name.endswith("managed create"):
        return create_group(names[0], flags)
    if name.endswith("managed delete"):
        return delete(names[0])
    if name.endswith("list-instances"):
        state = state_of(names[0])
        if state is None:
            return not_found(names[0])
        entry = nodes().get(names[0], {})
        status = {"READY": "\tNONE\tRUNNING", "DELETING": "\tDELETING\tSTOPPING"}
        told = status.get(state, f"\tNONE\t{state}")
        for host in entry.get("hosts") or entry.get("ending", []):
            print(host + (told if "instanceStatus" in flags["format"][0] else ""))
    return 0  # Templates and policies leave no trace here.


def gke(name, names):
    """Node pools; their nodes are made as pods come (`fake_kubectl.py`)."""
    pools = ROOT / "pools"
    pools.mkdir(exist_ok=True)
    if name.endswith("node-pools create"):
        (pools / names[0]).touch(exist_ok=False)
    if name.endswith("node-pools describe"):
        if not (pools / names[0]).exists():
            print("ERROR: (gcloud) ResponseError: code=404, message=Not found", file=sys.stderr)
            return 1
        print("RUNNING")
    if name.endswith("node-pools delete"):
        (pools / names[0]).unlink()
    if name == "config get":
        print("p")
    return 0


def main():
    with (ROOT / "calls.log").open("a") as file:
        file.write(" ".join(sys.argv[1:]) + "\n")
    try:
        name, names, flags = check(["gcloud", *sys.argv[1:]])
    except Refused as error:
        print(f"ERROR: (gcloud) {error}", file=sys.stderr)
        return 2
    name = name.removeprefix("alpha ")
    if name.startswith("compute tpus "):
        return tpus(*name.split()[2:4], names, flags)
    if name.startswith(("container ", "config ")):
        return gke(name, names)
    return compute_engine(name, names, flags)


if __name__ == "__main__":
    sys.exit(main())
