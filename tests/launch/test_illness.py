"""Runs on slices that the cloud calls unhealthy, or whose hosts do not answer: a scripted cloud."""

import pytest
from test_watch import ARGUMENTS, DONE, GOING, NONE, Cloud, Partly, train

from vit_jax.errors import UserError
from vit_jax.launch.backends.cloud_tpu import launcher as cloud_tpu
from vit_jax.launch.hosts import HostState
from vit_jax.launch.hosts_launcher import MAX_FAILED, MAX_ILL, _may_be_its_fault
from vit_jax.launch.slices import ABSENT, COMING, LOST, READY, Slices


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("health", "end"),
    [
        ("UNHEALTHY_MAINTENANCE", "ended 1 RuntimeError: a chip does not answer"),
        ("TIMEOUT", "ended 75 cut short 21 times in a row; giving up"),
    ],
)
def test_a_run_that_fails_on_an_unhealthy_slice_gets_another_one(health, end):
    ill = [f"READY\t{health}"] * (MAX_ILL + 1)
    cloud = Cloud(["READY", "READY", *ill, "READY", "ABSENT", "CREATING", "READY"],
                  [NONE, GOING, f"h0 {end}", DONE])  # fmt: skip
    assert train(cloud) == 0
    assert cloud.done("tpu-vm delete") == cloud.done("tpu-vm create") == 1
    assert f"pod is {health}; creating it again" in cloud.said


def test_a_slice_on_which_a_run_fails_whenever_it_is_unhealthy_is_made_again():
    spell = ["READY", "READY\tTIMEOUT"]
    cloud = Cloud(["READY", *spell * MAX_FAILED, "READY", "ABSENT", "READY"],
                  [NONE, *[GOING, "h0 ended 1 RuntimeError"] * MAX_FAILED, DONE])  # fmt: skip
    assert train(cloud) == 0
    assert cloud.done("host.sh pod start") == MAX_FAILED + 1
    assert cloud.done("tpu-vm create") == 1


@pytest.mark.parametrize(("end", "code"), [("ended 2 error: no such file", 2), ("ended 3", 3),
                                         ("ended 75 stopped: saved step 3", 75)])  # fmt: skip
def test_a_mistake_or_a_stop_is_the_result_on_an_unhealthy_slice_as_well(end, code):
    cloud = Cloud(["READY", "READY", "READY\tTIMEOUT"], [NONE, GOING, f"h0 {end}"])
    assert train(cloud) == code
    assert not cloud.done("tpu-vm create")


def queue_of(nodes):
    """Lets a scripted cloud answer for a queued resource, then for each of its two nodes."""
    slices = Slices("pod", "z", type="v4-8", slices=2)
    answers = Cloud([UserError("NOT_FOUND") if node is None else node for node in nodes])
    return cloud_tpu(slices, answers, 0).fleet.look(answers).kind


@pytest.mark.parametrize(
    ("states", "kind"),
    [
        (["ACTIVE", "READY", "READY"], READY),
        (["ACTIVE", "READY", None], COMING),  # It was READY, or will be SUSPENDED.
        (["ACTIVE", None, "PREEMPTED"], LOST),
        (["ACTIVE", "REPAIRING", "PREEMPTED"], LOST),
        (["SUSPENDED"], LOST),
        ([None], ABSENT),
    ],
)
def test_a_queued_resource_that_is_active_is_not_absent_for_want_of_a_node(states, kind):
    assert queue_of(states) == kind


def test_a_run_waits_for_a_queued_resource_whose_node_is_gone():
    slices = Slices("pod", "z", type="v4-8", queued=True)
    gone = UserError("NOT_FOUND")
    cloud = Cloud(["ACTIVE", "READY", "ACTIVE", "READY", "ACTIVE", gone, "SUSPENDED", "SUSPENDED",
                   gone, "ACTIVE", "READY"], [NONE, GOING, DONE])  # fmt: skip
    assert cloud_tpu(slices, cloud, 0).train(ARGUMENTS, "/shared", None) == 0
    assert "pod: ACTIVE without a node" in cloud.said
    assert cloud.done("queued-resources delete") == cloud.done("queued-resources create") == 1


HOSTS = Slices("pod", "z", type="v4-16")  # Of two hosts.


def test_train_that_is_started_again_watches_a_run_of_which_a_host_is_cut_off():
    both = "h0 running step 5\nh1 running step 5"
    cloud = Partly(["READY"], ["h0 running step 3", "h0 running step 4", both,
                               "h0 ended 0\nh1 ended 0"])  # fmt: skip
    assert cloud_tpu(HOSTS, cloud, 0).train(ARGUMENTS, "/shared", None) == 0
    assert cloud.said.count("hosts of pod: 1 of 2 hosts do not answer") == 1
    assert not cloud.done("host.sh pod start")


@pytest.mark.parametrize("looks", [3, MAX_ILL])
def test_train_begins_no_run_where_a_silent_host_may_hide_one(looks):
    """It waits, and at last replaces the slice."""
    states = ["READY"] * looks + ["READY", "ABSENT"] * (looks == MAX_ILL) + ["READY"]
    ready = ["h0 none\nh1 none"] * (looks < MAX_ILL)
    cloud = Partly(states, [*["h0 none"] * looks, *ready, "h0 ended 0\nh1 ended 0"])
    assert cloud_tpu(HOSTS, cloud, 0).train(ARGUMENTS, "/shared", None) == 0
    assert cloud.done("tpu-vm create") == (looks == MAX_ILL)
    assert cloud.done("host.sh pod start") == 1


def test_a_stop_that_has_not_reached_all_hosts_is_not_the_fault_of_a_slice():
    states = [
        HostState.parse(f"h{i} {x}") for i, x in enumerate(["ended 75 stopped: x", "running s"])
    ]
    assert not _may_be_its_fault(75, states)
    assert _may_be_its_fault(75, states[1:])


def test_train_that_is_started_again_keeps_an_unhealthy_slice_on_which_the_run_goes_on():
    steps = [f"h0 running step {n}" for n in range(2 * MAX_ILL)]
    cloud = Cloud(["READY\tTIMEOUT"], [*steps, DONE])
    assert train(cloud) == 0
    assert not cloud.done("tpu-vm delete")
    assert not cloud.done("host.sh pod start")


def test_a_slice_is_repaired_lost_deleted_and_made_again():
    states = ["READY", "READY", "REPAIRING", "REPAIRING", "UNKNOWN", "UNKNOWN", "DELETING",
              "DELETING", "ABSENT", "CREATING", "READY\tHEALTHY"]  # fmt: skip
    cloud = Cloud(states, [NONE, GOING, NONE, DONE])
    assert train(cloud) == 0
    assert "pod: REPAIRING" in cloud.said
    assert cloud.done("tpu-vm delete") == cloud.done("tpu-vm create") == 1
