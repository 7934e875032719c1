"""The launcher on GKE while it watches: a scripted kubectl."""

import dataclasses
import json

import pytest
import yaml
from cloud_reference import check
from manifest_schema import errors

from vit_jax.errors import UserError
from vit_jax.launch import slices as slices_lib
from vit_jax.launch.backends import gke
from vit_jax.launch.backends.gke import launcher
from vit_jax.launch.health import MARK
from vit_jax.launch.jobset import ARGUMENTS
from vit_jax.launch.launcher import on_one_line
from vit_jax.launch.shell import Failed, Shell
from vit_jax.launch.slices import Slices

SLICES = Slices("pod", "z", type="v6e-16", backend="gke", cluster="c", image="i", project="p")
RUN = ["--restarts=20", "--config=c.py", "--workdir=gs://b/r", "--config.x=a\nb"]


class Kubectl(Shell):
    """A cluster whose JobSet has these conditions, one a look; None stands for no JobSet."""

    def __init__(self, conditions, arguments=RUN, restarts=0, pods=(), line="step 3"):
        super().__init__()
        self.conditions, self.arguments, self.restarts = list(conditions), arguments, restarts
        self.pods, self.line, self.applied, self.said, self.commands = pods, line, [], [], []

    def run(self, command, seconds=None, tolerate=()):
        self.ask(command)

    def ask(self, command, pretend="", seconds=None, stdin=""):
        check(command)
        self.commands.append(command[1:3])
        if command[1] == "apply":
            self.applied.append(yaml.safe_load(stdin))
        if command[1:3] == ["get", "pods"]:
            return json.dumps({"items": list(self.pods)})
        if command[1] == "logs":
            if self.line is None:
                raise Failed("container is waiting to start")
            return self.line + "\n"
        return self._jobset() if command[1:3] == ["get", "jobset"] else ""

    def _jobset(self):
        condition = self.conditions.pop(0) if len(self.conditions) > 1 else self.conditions[0]
        if condition is None:
            raise Failed('Error from server (NotFound): jobsets "pod" not found')
        ended = [{"type": condition, "status": "True"}] if condition else []
        annotations = {ARGUMENTS: on_one_line(self.arguments)}
        status = {"conditions": ended, "restarts": self.restarts}
        return json.dumps({"metadata": {"annotations": annotations}, "status": status})

    def say(self, text):
        self.said.append(text)


def told(pod):
    """Returns what a pod with four well chips prints before the all-reduce."""
    chips = [{"kind": "cpu", "tflops": 1.0, "right": True}] * 4
    return MARK + json.dumps({"host": pod, "chips": chips})


def train(kubectl, arguments=RUN):
    return launcher(SLICES, kubectl, 0).train(arguments, "gs://b/r", None)


def test_a_run_is_applied_followed_and_done():
    kubectl = Kubectl([None, "", "", "Completed"], restarts=2)
    assert train(kubectl) == 0
    (manifest,) = kubectl.applied
    assert list(errors(manifest)) == []
    assert "pod-slice-0-0: step 3" in kubectl.said
    assert "pod: started again 2 times" in kubectl.said
    assert "pod: done; it is there, and costs" in kubectl.said[-1]


def test_a_run_that_is_going_is_followed_and_another_refused():
    kubectl = Kubectl(["", "", "Completed"])
    assert train(kubectl) == 0
    assert kubectl.applied == []
    with pytest.raises(
        UserError, match=r"another run is going on pod: .*--config.x=a\\nb; .* stop"
    ):
        train(Kubectl([""]), [*RUN, "--config.seed=1"])


def test_a_job_set_that_has_ended_makes_way():
    kubectl = Kubectl(["Failed", "", "Completed"])
    assert train(kubectl) == 0
    assert kubectl.commands[:3] == [
        ["get", "jobset"],
        ["delete", "jobset"],
        ["apply", "--filename=-"],
    ]


def test_a_failure_has_the_code_and_the_last_line_of_a_pod():
    def pod(name, code):
        state = {"terminated": {"exitCode": code}}
        return {"metadata": {"name": name}, "status": {"containerStatuses": [{"state": state}]}}

    pods = [pod("pod-slice-0-1", 0), pod("pod-slice-0-2", 75), pod("pod-slice-0-0", 2)]
    kubectl = Kubectl([None, "", "Failed"], pods=pods, line="error: no such file")
    assert train(kubectl) == 2
    assert "pod ended with 2: error: no such file" in kubectl.said


def test_pods_that_do_not_run_yet_are_waited_for():
    kubectl = Kubectl([None, "", "", "Completed"], line=None)
    assert train(kubectl) == 0


def test_a_job_set_that_is_gone_is_told():
    with pytest.raises(UserError, match="pod has no JobSet any more"):
        train(Kubectl([None, "", None]))


def test_an_answer_that_is_no_json_is_told():
    kubectl = Kubectl([""])
    kubectl.ask = lambda *_, **__: "<html>"
    with pytest.raises(UserError, match="kubectl get jobset prints no JSON: '<html>'"):
        train(kubectl)


def test_check_runs_as_a_job_set_of_its_own(capsys):
    kubectl = Kubectl([None, None, "", "Completed"], line=told("pod-check-slice-0-0"))
    assert launcher(SLICES, kubectl, 0).check("gs://b/check") == 1
    (manifest,) = kubectl.applied
    assert manifest["metadata"]["name"] == "pod-check"
    (job,) = manifest["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "vit_jax.launch.measure"]
    assert container["args"] == ["--workdir=gs://b/check"]
    assert kubectl.commands[-1] == ["delete", "jobset"]
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines() if row}
    assert rows["pod-check-slice-0-0"].endswith("  the all-reduce did not end")
    assert rows["pod-check-slice-0-3"].endswith("NO ANSWER")


def test_a_pod_that_is_ill_does_not_end_the_others_of_a_check(capsys):
    kubectl = Kubectl([None, None, "Completed"])
    launcher(SLICES, kubectl, 0).check("")
    (manifest,) = kubectl.applied
    assert list(errors(manifest)) == []
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 0
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["backoffLimitPerIndex"] == 0
    assert not {"backoffLimit", "podFailurePolicy"} & {*job["template"]["spec"]}


def test_a_check_waits_neither_for_a_run_nor_for_ever(capsys, monkeypatch):
    with pytest.raises(UserError, match=r"a run is going on pod, .* tpu stop pod"):
        launcher(SLICES, Kubectl([""]), 0).check("")
    monkeypatch.setattr(gke, "CHECK_SECONDS", 0.0)
    kubectl = Kubectl([None, None, ""])
    assert launcher(SLICES, kubectl, 0).check("") == 1
    assert kubectl.commands[-1] == ["delete", "jobset"]
    assert capsys.readouterr().out.count("NO ANSWER") == 4


def test_a_pod_that_has_not_started_keeps_no_other_from_the_table_of_a_check(capsys, monkeypatch):
    """kubectl prints the logs of those that have, and fails."""

    class Pending(Kubectl):
        def ask(self, command, pretend="", seconds=None, stdin=""):
            if command[1] == "logs":
                assert "--ignore-errors=true" in command
                raise Failed("container is waiting to start", told("pod-check-slice-0-0") + "\n")
            return super().ask(command, pretend, seconds, stdin)

    monkeypatch.setattr(gke, "CHECK_SECONDS", 0.0)
    kubectl = Pending([None, None, ""])
    assert launcher(SLICES, kubectl, 0).check("") == 1
    assert "container is waiting to start" in kubectl.said
    printed = capsys.readouterr().out
    assert "pod-check-slice-0-0" in printed
    assert printed.count("NO ANSWER") == 3


class Missing(Shell):
    """Commands fail with the errors of their program; what is tolerated does not."""

    def __init__(self, gcloud, kubectl):
        super().__init__()
        self.errors, self.said, self.deleted = {"gcloud": gcloud, "kubectl": kubectl}, [], []

    def _call(self, command, seconds, *, capture, stdin=""):
        check(command)
        if command[0] == "gcloud":
            self.deleted.append(command[4])
        error = self.errors[command[0]]
        return bool(error), "", f"ERROR: {error}"

    def say(self, text):
        self.said.append(text)


@pytest.fixture
def memory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.mark.parametrize(
    "kubectl", ["", 'the server doesn\'t have a resource type "jobset"', "connection refused"]
)
def test_node_pools_that_are_gone_or_out_of_reach_do_not_keep_the_others(memory, kubectl):
    gone = "(gcloud.container.node-pools.delete) ResponseError: code=404, message=Not found: pool"
    shell = Missing(gone, kubectl)
    launcher(dataclasses.replace(SLICES, slices=2), shell, 0).delete()
    assert shell.deleted == ["pod-0", "pod-1"]
    assert len(shell.said) == bool(kubectl)
    with pytest.raises(UserError, match="PERMISSION_DENIED"):
        launcher(SLICES, Missing("PERMISSION_DENIED", ""), 0).delete()


def test_a_node_pool_that_is_there_stays_and_one_without_capacity_is_requested_again(memory):
    class Full(Kubectl):
        """Pools of which pod-0 is there, and pod-1 fails at first for want of capacity."""

        def __init__(self):
            super().__init__([None])
            self.status = {"pod-0": "RUNNING"}

        def run(self, command, seconds=None, tolerate=()):
            check(command)
            action, pool = command[3:5]
            self.commands.append(command[3:5])
            if action == "delete":
                del self.status[pool]
            if action == "create":
                failed = self.commands.count(["create", pool]) == 1
                self.status[pool] = "ERROR" if failed else "RUNNING"
                if failed:
                    raise Failed("zone z does not have enough resources available")

        def ask(self, command, pretend="", seconds=None, stdin=""):
            check(command)
            if command[4] not in self.status:
                raise Failed("ResponseError: code=404, message=Not found")
            return self.status[command[4]] + "\n"

    shell = Full()
    launcher(dataclasses.replace(SLICES, slices=2), shell, 0).create()
    assert shell.commands[:-1] == [["create", "pod-1"], ["delete", "pod-1"], ["create", "pod-1"]]
    assert "does not have enough resources available; trying again in 0 s" in shell.said[0]


def test_the_project_of_gcloud_is_that_of_the_cluster(memory):
    class Told(Kubectl):
        def ask(self, command, pretend="", seconds=None, stdin=""):
            if command == ["gcloud", "config", "get", "project"]:
                return self.line
            return super().ask(command, pretend, seconds, stdin)

    slices = dataclasses.replace(SLICES, project="")
    assert launcher(slices, Told([None], line="p\n"), 0)._pods()[-1] == "--context=gke_p_z_c"
    with pytest.raises(UserError, match="gcloud has no project; add --project"):
        launcher(slices, Told([None], line=""), 0)._pods()


def test_a_missing_plugin_of_kubectl_is_no_missing_job_set():
    plugin = "getting credentials: exec: executable gke-gcloud-auth-plugin not found"
    with pytest.raises(UserError, match="gke-gcloud-auth-plugin not found"):
        launcher(SLICES, Missing("", plugin), 0)._apply({}, "")


def test_commands_of_kubectl_are_for_the_cluster_that_was_named():
    slices = dataclasses.replace(SLICES, project="p", location="us-east5")
    _, _, flags = check(launcher(slices, Shell(), 0)._pods())
    assert flags["context"] == ["gke_p_us-east5_c"]


def test_node_pools_of_another_type_keep_their_policy(memory):
    shell = Missing("", "")
    launcher(SLICES, shell, 0).create()
    with pytest.raises(UserError, match="there is a pod of type v6e-16 already"):
        launcher(dataclasses.replace(SLICES, type="v6e-32"), shell, 0).create()


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ({"backend": "cloud_tpu", "cluster": "", "project": ""}, "with --backend=cloud-tpu"),
        ({"cluster": "d"}, "with --cluster=d"),
        ({"location": "us-east5"}, "with --location=us-east5"),
        ({"zone": "y"}, "with --zone=y"),
        ({"project": "q"}, "with --project=q"),
    ],
)
def test_slices_elsewhere_are_not_forgotten_for_node_pools(memory, known, told):
    known = dataclasses.replace(SLICES, **known)
    slices_lib.remember(known)
    shell = Missing("", "")
    with pytest.raises(UserError, match=f"there is a pod {told} already; .* tpu delete it"):
        launcher(SLICES, shell, 0).create()
    assert shell.deleted == []  # No command was given.
    assert slices_lib.recall("pod") == known


@pytest.mark.parametrize(
    ("length", "changes", "told"),
    [
        (41, {}, "would be the name of a node pool; write at most 40 characters"),
        (39, {"slices": 2}, "-1 would be the name of a node pool; write at most 38 characters"),
        (40, {"type": "v5p-1024"}, "-0-127-XXXXX would be the name of a pod; write at most 39"),
    ],
)
def test_a_name_that_is_too_long_for_gke_is_refused_before_anything_is_created(
    memory, length, changes, told
):
    shell = Missing("", "")
    slices = dataclasses.replace(SLICES, name="n" * length, **changes)
    with pytest.raises(UserError, match=told):
        launcher(slices, shell, 0).create()
    assert shell.deleted == []
    assert slices_lib.recall(slices.name) is None
    shorter = dataclasses.replace(slices, name="n" * 34)
    launcher(shorter, shell, 0).create()
    assert slices_lib.recall(shorter.name)
