"""A strict `kubectl` whose pods are processes of this machine, each in a network of its own.

It refuses what the public reference and the published schemas lack. Everything of a JobSet lies in
$FAKE_GCLOUD/kubernetes/NAME: `manifest.json`, `status.json`, and for each pod a log and a home. A
controller, which `apply` starts and `delete` ends, does what those of Kubernetes and of JobSet do:
it starts the pods, gives them what GKE tells pods of TPU slices, and obeys the failure policies.

A file `POD.evicted` stands for a node that is taken away: its pod gets SIGTERM, and SIGKILL soon;
at once if the file says that the node is `unreachable`.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
import fake_network  # noqa: E402
from cloud_reference import Refused, check  # noqa: E402
from manifest_schema import errors, expanded  # noqa: E402

CLUSTER = Path(os.environ["FAKE_GCLOUD"]) / "kubernetes"
SPOT_SECONDS = 15
"""The time that GKE leaves a pod of a Spot node."""


def write(path, value):
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value))
    new.replace(path)


def read(path, otherwise=None):
    return json.loads(path.read_text()) if path.exists() else otherwise


class Pod:
    """A process with the variables of a pod, in the network and under the name of the pod."""

    def __init__(self, folder, replicated, job, index):
        self.name, self.folder = f"{folder.name}-{replicated['name']}-{job}-{index}", folder
        spec, slices = replicated["template"]["spec"], replicated["replicas"]
        hosts = spec["completions"]
        number = job * hosts + index
        self.job, self.index, self.is_evicted = job, index, False
        (folder / f"{self.name}.evicted").unlink(missing_ok=True)
        fake_network.connect(self.name, number, self.name)  # On a node that is well.
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        self.grace = pod["terminationGracePeriodSeconds"]
        with (folder / f"{self.name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*fake_network.inside(self.name, as_machine=True), *container["command"],
                 *map(expanded, container.get("args", []))],
                cwd=HERE.parent.parent, env=self._variables(number, hosts, slices),
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _variables(self, number, hosts, slices):
        tools = self.folder / "bin"
        tools.mkdir(exist_ok=True)
        if not (tools / "python").exists():  # Or pods that start would find half a script.
            (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
            (tools / "python").chmod(0o755)
        addresses = [fake_network.address(self.job * hosts + host) for host in range(hosts)]
        several = {
            "MEGASCALE_NUM_SLICES": str(slices),
            "MEGASCALE_SLICE_ID": str(self.job),
            "MEGASCALE_COORDINATOR_ADDRESS": fake_network.address(0),
        }
        kept = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
        return {
            "PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.folder),
            "JAX_PLATFORMS": "cpu",
            "JOB_COMPLETION_INDEX": str(self.index),
            "TPU_WORKER_ID": str(self.index),
            "TPU_WORKER_HOSTNAMES": ",".join(addresses),
            **(several if slices > 1 else {}),
            # Without TPUs JAX takes none of these, but those of SLURM.
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": fake_network.address(0),
            "SLURM_NTASKS": str(hosts * slices),
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": "0",
            "JAX_COORDINATOR_PORT": os.environ["FAKE_GCLOUD_PORT"],
            **{name: os.environ.get(name, "") for name in kept},
        }

    def look(self):
        """Returns the exit code, as a container has it, of a process that has ended; else None."""
        evicted = self.folder / f"{self.name}.evicted"
        if evicted.exists() and not self.is_evicted:
            self.is_evicted = True
            if evicted.read_text() == "unreachable":
                self.signal(signal.SIGKILL)
            self.end(SPOT_SECONDS)
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def end(self, seconds):
        """Ends the pod as Kubernetes does: SIGTERM, and SIGKILL after so many seconds."""
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.signal(signal.SIGKILL)
        self.process.wait()

    def signal(self, number):
        try:  # All processes, of which the trainer has a group of its own.
            pids = subprocess.run(
                ["ip", "netns", "pids", fake_network.namespace(self.name)],
                capture_output=True, text=True, check=False,
            ).stdout.split()  # fmt: skip
            for pid in pids if number == signal.SIGKILL else [self.process.pid]:
                os.kill(int(pid), number)
        except ProcessLookupError:
            pass


def end_all(pods):
    for pod in pods:
        pod.signal(signal.SIGTERM)
    for pod in pods:
        pod.end(pod.grace)


def reason_of_failure(job, pods):
    """Returns the reason of a failed job, in the words of its condition; "" for others."""
    ended = [(pod, code) for pod in pods if (code := pod.look()) is not None]
    failed = [(pod, code) for pod, code in ended if code]
    if "backoffLimitPerIndex" in job:
        return "FailedIndexes" if failed and len(ended) == len(pods) else ""
    for pod, code in failed:
        for rule in job["podFailurePolicy"]["rules"]:
            is_disrupted = "onPodConditions" in rule and pod.is_evicted
            is_listed = code in rule.get("onExitCodes", {}).get("values", [])
            if is_disrupted or is_listed:
                if rule["action"] == "FailJob":
                    return "PodFailurePolicy"
                break
    return "BackoffLimitExceeded" if len(failed) > job["backoffLimit"] else ""


def control(folder):
    """Keeps the pods of a JobSet until it has ended, or is deleted."""
    spec = read(folder / "manifest.json")["spec"]
    (replicated,) = spec["replicatedJobs"]
    job, slices = replicated["template"]["spec"], replicated["replicas"]
    policy, restarts = spec["failurePolicy"], 0
    while True:
        pods = [
            Pod(folder, replicated, number, index)
            for number in range(slices)
            for index in range(job["completions"])
        ]
        write(folder / "status.json", {"restarts": restarts})
        outcome, reason = "", ""
        while not outcome:
            time.sleep(0.2)
            codes = {pod.name: pod.look() for pod in pods}
            write(folder / "pods.json", codes)
            if (folder / "deleted").exists():
                end_all(pods)
                return (folder / "deleted").rename(folder / "gone")
            mine = [[pod for pod in pods if pod.job == number] for number in range(slices)]
            reason = next(filter(None, (reason_of_failure(job, one) for one in mine)), "")
            if reason:
                outcome = "Failed"
            elif all(code == 0 for code in codes.values()):
                outcome = "Completed"
        is_final = any(reason in rule["onJobFailureReasons"] for rule in policy["rules"])
        end_all(pods)
        if outcome == "Completed" or is_final or restarts == policy["maxRestarts"]:
            condition = {"type": outcome, "status": "True", "reason": reason or "AllJobsCompleted"}
            return write(folder / "status.json", {"restarts": restarts, "conditions": [condition]})
        restarts += 1


def not_found(name):
    print(f'Error from server (NotFound): jobsets "{name}" not found', file=sys.stderr)
    return 1


def apply():
    import yaml

    manifest = yaml.safe_load(sys.stdin.read())
    wrong = list(errors(manifest))
    if wrong:
        print(f"error: error validating data: {wrong}", file=sys.stderr)
        return 1
    folder = CLUSTER / manifest["metadata"]["name"]
    folder.mkdir(parents=True)
    write(folder / "manifest.json", manifest)
    with (folder / "controller.log").open("wb") as log:
        subprocess.Popen(
            [sys.executable, __file__, "control", folder],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    return 0


def get(names, flags):
    if names[0] == "pods":
        folder = CLUSTER / re.search("jobset-name=([a-z0-9-]+)", flags["selector"][0])[1]
        codes = read(folder / "pods.json", {})
        items = [
            {"metadata": {"name": name},
             "status": {"containerStatuses": [{"state": {"terminated": {"exitCode": code}}}]}}
            for name, code in codes.items() if code is not None
        ]  # fmt: skip
        print(json.dumps({"items": items}))
        return 0
    folder = CLUSTER / names[1]
    manifest = read(folder / "manifest.json")
    if manifest is None:
        return 0 if flags.get("ignore-not-found") == ["true"] else not_found(names[1])
    status = read(folder / "status.json", {})
    print(json.dumps({"metadata": manifest["metadata"], "status": status}))
    return 0


def logs(names, flags):
    wanted = names[0] if names else "*"
    if "selector" in flags:
        labels = dict(part.split("=") for part in flags["selector"][0].split(","))
        jobset = labels["jobset.sigs.k8s.io/jobset-name"]
        job = labels.get("jobset.sigs.k8s.io/job-index", "*")
        index = labels.get("batch.kubernetes.io/job-completion-index", "*")
        wanted = f"{jobset}-*-{job}-{index}"
    tail = int(flags["tail"][0])
    for file in sorted(CLUSTER.glob(f"*/{wanted}.log")):
        lines = file.read_text(errors="replace").splitlines()
        print("\n".join(lines if tail < 0 else lines[-tail:]))
    return 0


def delete(name, flags):
    folder = CLUSTER / name
    if not folder.exists():
        return 0 if flags.get("ignore-not-found") == ["true"] else not_found(name)
    if "conditions" not in read(folder / "status.json", {}):
        (folder / "deleted").touch()
        while not (folder / "gone").exists():
            time.sleep(0.1)
    shutil.rmtree(folder)
    return 0


def main():
    if sys.argv[1] == "control":
        folder = Path(sys.argv[2])
        try:
            control(folder)
        except Exception:
            failed = {"type": "Failed", "status": "True", "reason": "controller.log"}
            write(folder / "status.json", {"conditions": [failed]})
            raise
        return 0
    try:
        name, names, flags = check(["kubectl", *sys.argv[1:]])
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if name == "apply":
        return apply()
    if name == "delete":
        return delete(names[1], flags)
    return {"get": get, "logs": logs}[name](names, flags)


if __name__ == "__main__":
    sys.exit(main())
