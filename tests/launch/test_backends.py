"""Compute Engine and GKE: the commands and manifests, held against the public references."""

import dataclasses
import re
import shlex
import subprocess

import pytest
import yaml
from cloud_reference import REFERENCE, Refused, check, pasted
from manifest_schema import JOB_SET, KUBERNETES, errors, expanded

from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.launch import jobset
from vit_jax.launch.backends.compute_engine import ComputeEngine, launcher
from vit_jax.launch.gcloud import PREVIEWS
from vit_jax.launch.launcher import MAX_UNREACHED
from vit_jax.launch.shell import Shell
from vit_jax.launch.slices import Slices

CE = ["--zone=us-central1-c", "--project=p", "--backend=compute-engine", "--type=tpu7x-16"]
GKE = [
    "--zone=us-east5-a", "--location=us-east5", "--cluster=c", "--backend=gke", "--type=v6e-16",
    "--image=r/i:t",
]  # fmt: skip
RUN = ["--config=configs/digits.py", "--workdir=gs://bucket/run"]


@pytest.fixture
def dry(capsys, tmp_path, monkeypatch):
    """`dry(action, ...)` is what a shell runs where a dry run's output is pasted into it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(action, *arguments):
        assert main(["tpu", action, "pod", "--dry-run", *arguments]) == 0
        return pasted(capsys.readouterr().out, tmp_path)

    return run


def only(lines, *words):
    """The one command line that has these words."""
    found = [line for line in lines if set(words) <= set(line)]
    assert len(found) == 1, found
    return found[0]


def test_compute_engine_makes_a_policy_a_template_and_a_group_of_all_hosts(dry):
    policy, template, group, look = dry("create", *CE)
    assert policy[1:6] == ["compute", "resource-policies", "create", "workload-policy", "pod"]
    assert {"--accelerator-topology=2x2x2", "--region=us-central1"} < {*policy}
    assert {
        "--machine-type=tpu7x-standard-4t", "--image-family=ubuntu-accel-2404-amd64-tpu-tpu7x",
        "--boot-disk-type=hyperdisk-balanced", "--instance-template-region=us-central1",
    } < {*template}  # fmt: skip
    assert {
        "--size=2", "--target-size-policy-mode=bulk", "--default-action-on-vm-failure=do-nothing",
        "--template=projects/p/regions/us-central1/instanceTemplates/pod",
        "--workload-policy=projects/p/regions/us-central1/resourcePolicies/pod",
    } < {*group}  # fmt: skip
    assert "list-instances" in look


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--spot"], ["--provisioning-model=SPOT", "--instance-termination-action=STOP"]),
        (
            ["--provisioning-model=flex-start", "--max-run-duration=7d"],
            [
                "--provisioning-model=FLEX_START",
                "--max-run-duration=7d",
                "--instance-termination-action=DELETE",
                "--reservation-affinity=none",
            ],
        ),
        (
            ["--reservation=r", "--provisioning-model=reservation-bound"],
            ["--reservation=r", "--reservation-affinity=specific"],
        ),
        (["--labels=a=b", "--tags=t", "--", "--metadata=k=v"], ["--labels=a=b", "--metadata=k=v"]),
        (["--data-disk=source=x/y/d,mode=read-only"], ["--disk=name=d,mode=ro"]),
        (["--internal-ip", "--subnetwork=s"], ["--no-address", "--subnet=s"]),
    ],
)
def test_capacity_of_compute_engine_is_in_the_template(dry, flags, expected):
    template = only(dry("create", *CE, *flags), "instance-templates")
    assert {*expected} < {*template}


def test_a_single_host_needs_no_policy(dry):
    lines = dry("create", *CE[:-1], "--type=v6e-8")
    assert [line[2] for line in lines] == ["instance-templates", *["instance-groups"] * 2]
    assert "--machine-type=ct6e-standard-8t" in lines[0]
    assert "--target-size-policy-mode=bulk" not in lines[1]


def test_a_single_host_that_starts_flexibly_is_waited_for_and_not_repaired(dry):
    flex = ["--provisioning-model=flex-start", "--max-run-duration=7d"]
    template, group, _ = dry("create", *CE[:-1], "--type=v6e-8", *flex)
    assert "--provisioning-model=FLEX_START" in template
    assert {
        "--size=1", "--target-size-policy-mode=bulk", "--default-action-on-vm-failure=do-nothing"
    } < {*group}  # fmt: skip
    assert not any(word.startswith("--workload-policy") for word in group)


VALUES = {"duration": "1h", "int": "1", "pairs": "a=b"}


@pytest.mark.parametrize("command", [name for name in PREVIEWS if name.endswith(" create")])
def test_flags_that_only_a_preview_has_make_a_command_of_the_preview(capsys, command):
    """A flag after `--` changes the command to the release track whose reference has it."""
    backend = {
        "tpu-vm": ["--zone=z", "--type=v4-8"], "queued-resources": ["--zone=z", "--type=v4-16"],
        "instance-templates": CE, "node-pools": GKE,
    }[command.split()[-2]]  # fmt: skip
    for track, flags in PREVIEWS[command].items():
        known = REFERENCE["gcloud"][f"{track} {command}"]["flags"]
        assert not {*flags} & {*REFERENCE["gcloud"][command]["flags"]}
        for flag in flags:
            kind = known[flag]
            value = VALUES.get(kind, kind.removeprefix("choice:").split("|")[0])
            word = f"--{flag}" if kind == "none" else f"--{flag}={value}"
            if f"--{flag}" in ("--provisioning-model", "--reservation", "--max-run-duration"):
                continue  # The launcher has these itself.
            assert main(["tpu", "create", "pod", "--dry-run", *backend, "--", word]) == 0
            lines = map(shlex.split, capsys.readouterr().out.splitlines())
            (found,) = (words for words in lines if word in words)
            assert found[1] == track
            check(found)


def test_several_slices_are_groups_that_are_told_of_each_other(dry):
    lines = dry("train", *CE, "--slices=2", *RUN)
    started = [line[-4] for line in lines if " start " in " ".join(line)]
    assert len(started) == 4  # Two hosts of each of two slices.
    told = {re.search(r"MEGASCALE_SLICE_ID=(\d)", command)[1] for command in started}
    assert told == {"0", "1"}
    assert all("MEGASCALE_NUM_SLICES=2 bash host.sh pod start" not in one for one in started)
    first = "env 'MEGASCALE_COORDINATOR_ADDRESS=10.0.0.2:8080' MEGASCALE_PORT=8080"
    assert all(f"{first} MEGASCALE_NUM_SLICES=2 " in one for one in started)
    assert len([line for line in lines if "worker-network-endpoints" in " ".join(line)]) == 2


def test_every_action_of_cloud_tpu_can_be_pasted(dry):
    for more in (["--type=v4-8"], ["--type=v5e-256", "--slices=2", "--spot", "--iap"]):
        for action in ("create", "train", "logs", "status", "stop", "delete", "check"):
            assert dry(action, "--zone=z", *more, *(RUN if action == "train" else []))


def test_every_action_of_compute_engine_can_be_pasted(dry):
    for action in ("train", "logs", "status", "stop", "delete", "check"):
        lines = dry(action, *CE, *(RUN if action == "train" else []))
        assert lines
        if action in ("train", "check"):  # Nothing is copied that the commands have not made.
            (archive,) = (line for line in lines if "vit_jax.launch.archive" in line)
            copies = [line for line in lines if "scp" in line]
            assert copies
            assert all(archive[-1] in line for line in copies)
    deleted = dry("delete", *CE[:-1])
    assert [line[2] for line in deleted] == [
        "instance-groups", "instance-templates", "resource-policies"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("listed", "state"),
    [
        ("a\tNONE\tRUNNING\nb\tNONE\tRUNNING", "READY"),
        ("a\tNONE\tRUNNING\nb\tCREATING\tSTAGING", "COMING"),
        ("", "COMING"),
        ("a\tCREATING\t\nb\tCREATING\t", "COMING"),
        ("a\tNONE\tRUNNING\nb\tNONE\tTERMINATED", "STOPPED"),  # By somebody.
        ("a\tNONE\tRUNNING\nb\tNONE\tSTOPPING", "COMING"),
        ("a\tNONE\tRUNNING", "LOST"),  # The other has been deleted.
        ("a\tNONE\tSUSPENDED\nb\tNONE\tRUNNING", "STOPPED"),
        ("a\tDELETING\tSTOPPING\nb\tDELETING\tRUNNING", "COMING"),  # By `tpu delete`.
        ("a\tDELETING\tSTOPPING", "COMING"),
    ],
)
def test_states_of_groups(listed, state):
    class Told(Shell):
        def ask(self, command, pretend="", seconds=None, stdin=""):
            return listed

    slices = Slices("pod", "us-central1-c", type="tpu7x-16", project="p")
    assert ComputeEngine(slices).look(Told()).kind == state
    if {"TERMINATED", "STOPPING"} & {*listed.split()} and "DELETING" not in listed:
        spot = dataclasses.replace(slices, spot=True)  # Which the cloud takes away.
        assert ComputeEngine(spot).look(Told()).kind == "LOST"
    if "DELETING" in listed:  # Or by the cloud, at the end of their time.
        ending = dataclasses.replace(slices, max_run_duration="7d")
        assert ComputeEngine(ending).look(Told()).kind == "LOST"


class Failing(Shell):
    """A group whose hosts cannot be created, for this reason."""

    def __init__(self, error):
        super().__init__()
        self.error, self.said, self.looks = error, [], 0

    def run(self, command, seconds=None, tolerate=()):
        check(command)

    def ask(self, command, pretend="", seconds=None, stdin=""):
        check(command)
        self.looks += 1
        running = "a\tNONE\tRUNNING\t\t\nb\tNONE\tRUNNING\t\t"
        made = self.looks > 3 and "EXHAUSTED" in self.error
        return running if made else f"a\tCREATING\t\t{self.error}\nb\tCREATING\t\t\t"

    def say(self, text):
        self.said.append(text)


@pytest.mark.parametrize(
    ("error", "looks"),
    [
        ("QUOTA_EXCEEDED\tQuota 'TPUS' exceeded. Limit: 0.", MAX_UNREACHED + 1),
        ("RESOURCE_NOT_FOUND\tThe resource 'projects/p/reservations/r' was not found", 1),
        ("INVALID_USAGE\tInvalid value for the image", 1),
    ],
)
def test_a_group_that_can_create_no_host_tells_why(tmp_path, monkeypatch, error, looks):
    """The request for the group itself succeeds at once."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    slices = Slices("pod", "us-central1-c", type="tpu7x-16", project="p", backend="compute_engine")
    shell = Failing(error)
    error = error.replace("\t", ": ").rstrip(".")
    why = f"the hosts of pod cannot be created: {error}; .* tpu delete pod"
    with pytest.raises(UserError, match=why):
        launcher(slices, shell, 0).create()
    assert shell.looks == looks
    waiting = Failing("ZONE_RESOURCE_POOL_EXHAUSTED\tThe zone does not have enough resources")
    launcher(dataclasses.replace(slices, name="other"), waiting, 0).create()
    assert "PENDING (ZONE_RESOURCE_POOL_EXHAUSTED: The zone" in waiting.said[0]


def test_gke_makes_a_node_pool_for_each_slice(dry):
    lines = dry("create", *GKE, "--slices=2", "--spot")
    pools = [line for line in lines if line[2:4] == ["node-pools", "create"]]
    assert [line[4] for line in pools] == ["pod-0", "pod-1"]
    assert {
        "--machine-type=ct6e-standard-4t", "--tpu-topology=4x4", "--num-nodes=4", "--spot",
        "--node-locations=us-east5-a", "--location=us-east5", "--cluster=c",
    } < {*pools[0]}  # fmt: skip
    assert lines[-1][1:4] == ["container", "clusters", "get-credentials"]
    lines = dry("create", *GKE[:-2], "--type=tpu7x-16")
    assert "workload-policy" in lines[0]
    assert {"--placement-policy=pod", "--disk-type=hyperdisk-balanced"} < {*lines[2]}
    lines = dry("create", *GKE, "--provisioning-model=flex-start", "--labels=team=a")
    assert {"--flex-start", "--num-nodes=0", "--max-nodes=4", "--labels=team=a"} < {*lines[1]}


def test_every_action_of_gke_can_be_pasted(dry, tmp_path):
    for action in ("status", "stop", "delete", "logs"):
        assert dry(action, *GKE[:4])
    assert dry("check", *GKE)
    lines = dry("train", *GKE, *RUN)
    assert lines[0] == ["gcloud", "config", "get", "project"]
    assert ["kubectl", "apply", "--filename=-", "--context=gke_p_us-east5_c"] in lines
    applied = yaml.safe_load((tmp_path / "record.manifest").read_text())
    assert list(errors(applied)) == []


def rendered(capsys, *arguments, run=RUN):
    assert main(["tpu", "render", "pod", *GKE, *run, *arguments]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_manifest_keeps_to_the_published_fields(capsys):
    for more in ([], ["--spot", "--slices=4", "--labels=team=a", "--namespace=n"]):
        assert list(errors(rendered(capsys, *more, "--service-account=s"))) == []


def test_the_manifest_of_a_run(capsys):
    found = rendered(capsys, "--slices=2", "--spot")
    (job,) = found["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    job = job["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # Which a podFailurePolicy needs.
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert container["command"] == ["python", "-m", "vit_jax", "train"]


def test_only_errors_that_would_come_again_end_a_job_set(capsys):
    found = rendered(capsys)
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    reasons = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert rule == {"name": "final", **reasons}
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    disruption, codes = job["podFailurePolicy"]["rules"]
    assert disruption["action"] == "Count"  # Before the codes: an eviction may end with any.
    assert codes["action"] == "FailJob"
    assert not {75, 134, 137, 143} & {*codes["onExitCodes"]["values"]}


AWKWARD = [
    "a b", 'it\'s "quoted"', "$(touch hacked)", "`touch hacked`", "a\nb", "$HOME", "é;x&y|z",
    "$$ $$(HOME) $",
]  # fmt: skip


def test_awkward_paths_and_overrides_reach_the_hosts_as_they_are(dry, tmp_path, capsys):
    overrides = [f"--config.task.x{n}={value}" for n, value in enumerate(AWKWARD)]
    place = f"--workdir=/shared/{' '.join(AWKWARD)}"
    run = [RUN[0], place]
    wanted = [*run, *overrides]
    for backend in (CE, ["--zone=z", "--type=v4-8"]):
        for words in dry("train", *backend, *run, *overrides):
            started = [word for word in words if " start " in word and "--command=" in word]
            if started:
                # What ssh hands to the host's shell.
                script = (
                    started[0].removeprefix("--command=").replace("bash host.sh", "printf %s\\\\0")
                )
                told = subprocess.run(
                    ["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
                )
                assert told.stdout.split("\0")[3:-1] == wanted
    args = rendered(capsys, *overrides, run=run)["spec"]["replicatedJobs"][0]["template"]["spec"]
    args = args["template"]["spec"]["containers"][0]["args"]
    assert [expanded(arg) for arg in args][1:] == wanted
    assert not list(tmp_path.rglob("hacked"))


def test_yaml_is_read_as_it_was_meant():
    texts = [
        *AWKWARD,
        "",
        " ",
        "no",
        "null",
        "1e3",
        "012",
        "- a",
        "a: b",
        "#",
        "\x85\u2028\t\0",
        "𐀀",
    ]
    value = {
        "texts": texts, "empty": [{}, [], ""], "nested": [[1, [2]], {"a": [{"b": -1, "c": True}]}],
        **dict.fromkeys(texts, "x"),
    }  # fmt: skip
    assert yaml.safe_load(jobset.to_yaml(value)) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "pod", *CE[:-1], "--type=v5e-8"], "take v5p, v6e and tpu7x"),
        (["create", "pod", *CE[:1], *CE[2:]], "needs --project"),
        (["create", "pod", *CE, "--autocheckpoint"], "--autocheckpoint is for Cloud TPU"),
        (["create", "pod", *CE, "--provisioning-model=flex-start"], "needs --max-run-duration"),
        (["create", "pod", *CE, "--data-disk=d"], "write source=DISK"),
        (["create", "pod", *CE, "--queued"], "--queued is not for --backend=compute-engine"),
        (["create", "pod", *GKE, "--data-disk=d"], "--data-disk is not for --backend=gke"),
        (["create", "pod", *GKE, "--iap"], "--iap is not for --backend=gke"),
        (["create", "pod", *GKE, "--provisioning-model=reservation-bound"], "needs --reservation"),
        (["create", "pod", *GKE[:2], *GKE[3:]], "--cluster is missing"),
        (["render", "pod", *GKE[:-1], *RUN], "--image is missing"),
        (["render", "pod", *GKE[:-2], "--image=i", "--type=v3-8", *RUN], "GKE has v4 and later"),
        (["render", "pod", *GKE[:-2], "--image=i", "--type=x", *RUN], "no such TPU type"),
        (["train", "pod", *GKE, *RUN, "--commit=a", "--repository=b"], "the image holds the code"),
        (["logs", "pod", *GKE, "--worker=all"], "--worker: invalid int value: 'all'"),
        (["logs", "pod", *GKE, "--worker=4"], "--worker=4: write a number from 0 to 3"),
        (["logs", "pod", *CE, "--worker=-1"], "--worker=-1: write a number from 0 to 1"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["tpu", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_reference_names_the_page_of_every_command():
    pages = [entry["source"] for commands in REFERENCE.values() for entry in commands.values()]
    pages += [JOB_SET["source"], KUBERNETES["source"], KUBERNETES["values"]["source"]]
    assert all(page.startswith("https://") for page in pages)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gcloud compute tpus tpu-vm create a --zone=z --version=v --reservation=r", "no flag"),
        ("gcloud compute tpus tpu-vm create a --zone=z", "--version is missing"),
        ("gcloud compute tpus tpu-vm ssh a --zone=z --tunnel-through-iap", "no flag"),
        ("gcloud compute tpus tpu-vm ssh a --zone=z --worker=0-100", "no range of at most 100"),
        ("gcloud alpha compute tpus tpu-vm ssh a --zone=z --iap", "no flag"),
        ("gcloud compute tpus nodes list", "no command"),
        (
            "gcloud compute tpus tpu-vm create a --zone=z --version=v --accelerator-type=v5e-8",
            "is no accelerator",
        ),
        ("kubectl get jobset a --output=table", "is no choice"),
    ],
)
def test_what_the_reference_lacks_is_refused(line, message):
    with pytest.raises(Refused, match=message):
        check(shlex.split(line))


def test_what_the_schemas_lack_is_refused(capsys):
    found = rendered(capsys)
    found["spec"]["replicas"] = 2
    del found["spec"]["failurePolicy"]["rules"][0]["name"]
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["parallelism"] = "4"
    job["podFailurePolicy"]["rules"][0]["action"] = "Fail"
    job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"] = [4]
    where = "$.spec.replicatedJobs[0].template.spec"
    assert set(errors(found)) == {
        f"{where}.parallelism is no integer",
        f"{where}.podFailurePolicy.rules[0].action='Fail' is none of"
        " ['FailJob', 'FailIndex', 'Ignore', 'Count']",
        f"{where}.template.spec.containers[0].resources.limits.google.com/tpu=[4] is of no kind"
        " that it may have",
        "$.spec.failurePolicy.rules[0].name is missing",
        "$.spec.replicas is unknown",
    }
