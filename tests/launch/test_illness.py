"""Runs on slices that the cloud calls unhealthy, or whose hosts do not answer: a scripted cloud."""

import pytest
from test_watch import ARGUMENTS, DONE, GOING, NONE, Cloud, train

from vit_jax.errors import UserError
from vit_jax.launch.backends.cloud_tpu import launcher as cloud_tpu
from vit_jax.launch.hosts_launcher import MAX_FAILED, MAX_ILL
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


@pytest.mark.parametrize(("end", "code"), [("ended 2 error: no such file", 2), ("ended 3", 3)])
def test_a_mistake_is_the_result_on_an_unhealthy_slice_as_well(end, code):
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
