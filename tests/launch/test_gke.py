"""The launcher on GKE while it watches: a scripted kubectl."""

import dataclasses
import json

import pytest
import yaml
from cloud_reference import check
from manifest_schema import errors

from vit_jax.errors import UserError
from vit_jax.launch.backends.gke import launcher
from vit_jax.launch.jobset import ARGUMENTS
from vit_jax.launch.launcher import on_one_line
from vit_jax.launch.shell import Failed, Shell
from vit_jax.launch.slices import Slices

SLICES = Slices("pod", "z", type="v6e-16", backend="gke", cluster="c", image="i")
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


def train(kubectl, arguments=RUN):
    return launcher(SLICES, kubectl, 0).train(arguments, "gs://b/r", None)


def test_a_run_is_applied_followed_and_done():
    kubectl = Kubectl([None, "", "", "Completed"], restarts=2)
    assert train(kubectl) == 0
    (manifest,) = kubectl.applied
    assert list(errors(manifest, "JobSet")) == []
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


def test_check_runs_as_a_job_set_of_its_own(capsys):
    kubectl = Kubectl([None, "", "Completed"], line="no host told anything")
    assert launcher(SLICES, kubectl, 0).check("gs://b/check") == 1
    (manifest,) = kubectl.applied
    assert manifest["metadata"]["name"] == "pod-check"
    (job,) = manifest["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "vit_jax.launch.measure"]
    assert container["args"] == ["--workdir=gs://b/check"]
    assert kubectl.commands[-1] == ["delete", "jobset"]
    assert "no host was measured" in capsys.readouterr().out


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
