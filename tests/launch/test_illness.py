"""Runs on slices that the cloud calls unhealthy, or whose hosts do not answer: a scripted cloud."""

import pytest
from test_watch import DONE, GOING, NONE, Cloud, train

from vit_jax.launch.hosts_launcher import MAX_FAILED, MAX_ILL


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
