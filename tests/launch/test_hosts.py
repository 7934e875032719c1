"""Long calls to hosts do not wait for slices, or hosts, that have gone away meanwhile."""

import time

import pytest
from test_illness import HOSTS
from test_watch import ARGUMENTS, SLICES, Cloud

from vit_jax.errors import UserError
from vit_jax.launch import hosts as hosts_lib
from vit_jax.launch.backends.cloud_tpu import launcher as cloud_tpu
from vit_jax.launch.hosts import Gone
from vit_jax.launch.hosts_launcher import MAX_ILL
from vit_jax.launch.shell import Shell

BOTH = "h0 none\nh1 none"


class Held(Cloud):
    """A cloud in which one kind of call would last for a minute, while others are answered.

    held: a word of this call. times: how often it lasts so long.
    """

    def __init__(self, states, hosts, held, times=1):
        super().__init__(states, hosts)
        self.held, self.times = held, times

    def ask(self, command, pretend="", seconds=None, stdin=""):
        if self.times and self.held in command:
            self._note(command)
            self.times -= 1
            return Shell.ask(self, ["sh", "-c", "echo h0; exec sleep 60"], seconds=seconds)
        return super().ask(command, pretend, seconds, stdin)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(hosts_lib, "SHORTEST_POLL", 0.05)
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 30


PREPARE = "--command=bash host.sh pod prepare"
MEASURE = "--command=bash host.sh pod measure"


@pytest.mark.parametrize(
    ("states", "answers", "message"),
    [
        (["READY", "PREEMPTED"], [BOTH], "pod became PREEMPTED"),
        (["READY", "REPAIRING", UserError("NOT_FOUND")], [BOTH], "pod became ABSENT"),
        (["STOPPED"], [BOTH], "pod became STOPPED"),
        (["READY"], [BOTH, "h0 none"], "pod: h1 does not answer"),
        (["READY"], [BOTH, "h0 none", BOTH, "h0 none"], "pod: h1 does not answer"),
        (["READY"], [UserError("no route")], "pod: no host answers"),
        (["READY"], [BOTH, "h0 none", UserError("no route"), BOTH], "pod: h1 does not answer"),
    ],
)
def test_a_long_call_ends_when_slices_or_hosts_are_gone(states, answers, message):
    cloud = Held(states, answers, PREPARE)
    with pytest.raises(Gone, match=message) as caught:
        cloud_tpu(HOSTS, cloud, 0).hosts.everywhere("bash host.sh pod prepare", 3600)
    assert caught.value.output == "h0\n"


def test_a_host_that_has_never_answered_is_counted():
    states, silent = cloud_tpu(HOSTS, Cloud(["READY"], ["h0 none"]), 0).hosts.answers()
    assert [state.host for state in states] == ["h0"]
    assert silent == ["1 of 2 hosts"]


def test_a_look_that_fails_says_nothing_about_the_slices():
    cloud = Held([UserError("503"), "READY", "PREEMPTED"], [BOTH], PREPARE)
    with pytest.raises(Gone, match="pod became PREEMPTED"):
        cloud_tpu(HOSTS, cloud, 0).hosts.everywhere("bash host.sh pod prepare", 3600)
    assert cloud.said == ["503; looking again"]


@pytest.mark.parametrize("held", [PREPARE, "scp"])
def test_slices_that_are_taken_away_while_they_are_prepared_are_made_again(held):
    states = ["READY", "READY", "PREEMPTED", "PREEMPTED", "PREEMPTED", "ABSENT", "READY"]
    cloud = Held(states, ["h0 none", "h0 none", "h0 ended 0"], held)
    assert cloud_tpu(SLICES, cloud, 0).train(ARGUMENTS, "/shared", None) == 0
    assert cloud.said[:3] == [
        "pod: READY", "pod became PREEMPTED; looking again", "pod was preempted; creating it again"
    ]  # fmt: skip
    assert cloud.done("tpu-vm create") == cloud.done("host.sh pod start") == 1


def test_a_host_that_vanishes_while_it_is_prepared_is_waited_for_and_the_run_begins():
    alone = "h0 none"
    cloud = Held(["READY"], [BOTH, alone, alone, alone, BOTH, "h0 ended 0\nh1 ended 0"], PREPARE)
    assert cloud_tpu(HOSTS, cloud, 0).train(ARGUMENTS, "/shared", None) == 0
    assert "pod: h1 does not answer; looking again" in cloud.said
    assert "hosts of pod: h1 does not answer" in cloud.said
    assert cloud.done("host.sh pod start") == 1
    assert cloud.done(PREPARE) == 2


def test_a_host_that_stays_away_while_it_is_prepared_is_replaced():
    answers = [BOTH, *["h0 none"] * (2 + MAX_ILL), "h0 ended 0\nh1 ended 0"]
    cloud = Held(["READY"], answers, PREPARE)
    run = cloud.run

    def deletes(command, *_):
        run(command)
        cloud.states = ["ABSENT", "READY"] if "delete" in command else cloud.states

    cloud.run = deletes
    assert cloud_tpu(HOSTS, cloud, 0).train(ARGUMENTS, "/shared", None) == 0
    assert "pod: h1 does not answer; creating it again" in cloud.said
    assert cloud.done("tpu-vm create") == cloud.done("tpu-vm delete") == 1


def test_a_check_names_the_host_that_vanishes(capsys):
    cloud = Held(["READY"], [BOTH, "h0 none"], MEASURE)
    assert cloud_tpu(HOSTS, cloud, 0).check("") == 1
    assert cloud.said == ["pod: READY", "pod: h1 does not answer"]
    assert "NO ANSWER" in capsys.readouterr().out
