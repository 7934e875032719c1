"""The launcher watches a scripted cloud, without processes."""

import dataclasses
import subprocess

import hypothesis
import pytest
from hypothesis import strategies

from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.launch import hosts_launcher
from vit_jax.launch import slices as slices_lib
from vit_jax.launch.backends.cloud_tpu import launcher as cloud_tpu
from vit_jax.launch.hosts import HOST_SCRIPT, HostState
from vit_jax.launch.hosts_launcher import MAX_ILL
from vit_jax.launch.launcher import MAX_UNREACHED, on_one_line
from vit_jax.launch.shell import Failed, Shell
from vit_jax.launch.slices import Slices

SLICES = Slices("pod", "z", type="v4-8")
ARGUMENTS = ["--config=c.py", "--workdir=/shared"]
GOING, DONE, NONE = "h0 running step 3", "h0 ended 0 done", "h0 none"


def ran(*arguments):
    """Returns the output of `host.sh NAME arguments` of a run with these arguments."""
    script = 'source "$1"; on_one_line "${@:2}"'
    command = ["bash", "-c", script, "bash", str(HOST_SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


class Cloud(Shell):
    """Answers from lists, of which the last item stays; an exception among them is raised.

    states: of the slices, one a look. hosts: what they say of the run. failures: texts of commands
    that fail → how often.
    """

    def __init__(self, states, hosts=(DONE,), failures=()):
        super().__init__()
        self.states, self.hosts, self.failures = list(states), list(hosts), dict(failures)
        self.commands, self.said = [], []

    def _next(self, items):
        item = items.pop(0) if len(items) > 1 else items[0]
        if not isinstance(item, str):
            raise item
        return item

    def _note(self, command):
        text = " ".join(command)
        self.commands.append(text)
        for part in self.failures:
            if part in text and self.failures[part] > 0:
                self.failures[part] -= 1
                raise UserError(f"{part} failed")

    def run(self, command, seconds=None, tolerate=()):
        self._note(command)

    def ask(self, command, pretend="", seconds=None, stdin=""):
        self._note(command)
        if " describe " in self.commands[-1]:
            return self._next(self.states)
        if " state;" in self.commands[-1]:
            return self._next(self.hosts) + "\n"
        return ran(*ARGUMENTS) if " arguments" in self.commands[-1] else ""

    def say(self, text):
        self.said.append(text)

    def done(self, *words):
        """Returns the number of commands that had all of these words."""
        return sum(all(word in command for word in words) for command in self.commands)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def train(cloud, arguments=ARGUMENTS):
    return cloud_tpu(SLICES, cloud, 0).train(arguments, "/shared", None)


def test_it_begins_looks_and_tells_that_slices_cost(elsewhere):
    cloud = Cloud(["READY"], [NONE, GOING, GOING, DONE])
    assert train(cloud) == 0
    assert cloud.done("host.sh pod start") == 1
    assert "h0: step 3" in cloud.said
    assert "until python -m vit_jax tpu delete pod" in cloud.said[-1]


def test_a_run_that_is_going_is_watched():
    cloud = Cloud(["READY"], [GOING, GOING, DONE])
    assert train(cloud) == 0
    assert cloud.done("start") == 0


def test_another_run_that_is_going_is_left_alone():
    with pytest.raises(UserError, match=r"--workdir=/shared; python -m vit_jax tpu stop pod"):
        train(Cloud(["READY"], [GOING]), ["--config=other.py"])


def test_preempted_slices_are_made_again():
    """Their hosts may have other names than before."""
    hosts = [NONE, GOING, "h7 running step 3", "h7 ended 0 done", AssertionError]
    cloud = Cloud(["READY", "READY", "PREEMPTED", "PREEMPTED", "ABSENT", "CREATING", "READY"],
                  hosts)  # fmt: skip
    assert train(cloud) == 0
    assert cloud.done("tpu-vm delete") == cloud.done("tpu-vm create") == 1
    assert cloud.done("host.sh pod start") == 2


def test_slices_that_were_deleted_are_not_bought_again():
    cloud = Cloud(["READY", "READY", "ABSENT"], [NONE, GOING])
    with pytest.raises(UserError, match=r"pod is ABSENT; python -m vit_jax tpu create it"):
        train(cloud)
    assert not cloud.done("tpu-vm create")


def test_a_look_that_fails_costs_no_place_in_the_queue():
    states = ["PREEMPTED", "ABSENT", UserError("503"), "CREATING", UserError("503"), "READY"]
    cloud = Cloud(states, [NONE, DONE])
    assert train(cloud) == 0
    assert cloud.done("tpu-vm create") == 1
    assert not cloud.done("tpu-vm delete")


def test_without_capacity_it_asks_again():
    cloud = Cloud(["PREEMPTED", "ABSENT", "ABSENT", "ABSENT", "READY"], [NONE, DONE],
                  {"tpu-vm create": 2})  # fmt: skip
    assert train(cloud) == 0
    assert cloud.done("tpu-vm create") == 3
    assert "tpu-vm create failed; trying again" in cloud.said


def test_hosts_that_could_not_be_prepared_after_a_preemption_are_prepared_again():
    cloud = Cloud(["READY", "READY", "PREEMPTED", "READY"], [NONE, GOING, DONE])
    prepare, cloud._prepared = cloud._note, 0

    def fails_the_second_time(command):
        prepare(command)
        if "scp" in command:
            cloud._prepared += 1
            if cloud._prepared == 2:
                raise UserError("scp failed")

    cloud._note = fails_the_second_time
    assert train(cloud) == 0
    assert cloud._prepared == 3
    assert "scp failed; looking again" in cloud.said


def test_a_mistake_is_told_at_once():
    cloud = Cloud(["READY"], [NONE], {"host.sh pod check": 1})
    with pytest.raises(UserError, match="check failed"):
        train(cloud)
    assert not cloud.done("start")


def test_a_host_that_was_restarted_begins_again_with_the_others():
    cloud = Cloud(["READY"], [NONE, GOING, NONE, DONE], {"host.sh pod stop": 1})
    cloud.hosts.insert(3, NONE)
    assert train(cloud) == 0
    assert cloud.done("host.sh pod stop") == 2  # The first try did not reach them.
    assert cloud.done("host.sh pod start") == 2


def test_hosts_that_are_new_have_nothing_to_stop():
    """Or the launcher would ask in vain for a script that is not there, and give up."""
    cloud = Cloud(["READY"], [NONE, GOING, NONE, DONE])
    assert train(cloud) == 0
    asked = [command for command in cloud.commands if "host.sh pod stop" in command]
    assert asked
    assert all("if [ -f host.sh ]; then bash host.sh pod stop; else true; fi" in a for a in asked)


def test_silence_is_not_success():
    with pytest.raises(UserError, match="no host of pod tells its state"):
        train(Cloud(["READY"], ["Welcome to Ubuntu"]))
    cloud = Cloud(["READY"], [NONE, "", "Welcome to Ubuntu", GOING, DONE])
    assert train(cloud) == 0
    assert cloud.said.count("no host of pod tells its state; looking again") == 2


def test_repairs_are_waited_for():
    states = ["READY", "READY", *["REPAIRING"] * (2 * MAX_UNREACHED), "READY"]
    cloud = Cloud(states, [NONE, GOING, DONE])
    assert train(cloud) == 0
    assert cloud.said.count("pod: REPAIRING") == 1


def test_it_gives_up_where_nothing_can_be_reached():
    cloud = Cloud(["READY", "READY", UserError("no route")], [NONE, GOING])
    with pytest.raises(UserError, match="no route"):
        train(cloud)
    assert cloud.said.count("no route; looking again") == MAX_UNREACHED


def test_looks_that_fail_now_and_then_do_not_add_up():
    looks = [UserError("no route"), GOING] * (MAX_UNREACHED + 1)
    assert train(Cloud(["READY"], [NONE, *looks, DONE])) == 0


@pytest.mark.parametrize("other", ["running step 3", "ended 75 saved step 3", "ended 0 done"])
def test_a_failure_stops_the_other_hosts(other):
    """It is the result, whether others go on, were interrupted by it, or are done before it."""
    before = f"h0 {other}\nh1 running step 3" if "done" in other else GOING
    cloud = Cloud(["READY"], [NONE, before, f"h0 {other}\nh1 ended 2 error: no such file"])
    assert train(cloud) == 2
    assert cloud.done("host.sh pod stop") == 1
    told = [line for line in cloud.said if "ended with" in line]
    assert told == ["h1 ended with 2: error: no such file"]
    assert "costs" in cloud.said[-1]


def test_what_was_created_is_not_forgotten_for_what_could_not_be(capsys):
    cloud_tpu(SLICES, Cloud(["READY"]), 0).create()
    other = Slices("pod", "z", type="v6e-8")
    cloud = Cloud(["READY"])
    with pytest.raises(UserError, match="there is a pod of type v4-8 already"):
        cloud_tpu(other, cloud, 0).create()
    assert not cloud.done("create")
    cloud_tpu(other, Cloud(["ABSENT", "CREATING", "READY"]), 0).create()


def test_slices_that_fail_while_they_are_made():
    with pytest.raises(UserError, match=r"pod is FAILED; python -m vit_jax tpu delete pod, then"):
        cloud_tpu(SLICES, Cloud(["CREATING", "FAILED"]), 0).create()


def test_a_greeting_among_the_states():
    assert HostState.parse("Welcome to Ubuntu") is None
    assert HostState.parse("h0 ended 75 saved step 3") == HostState(
        "h0", "ended", 75, "saved step 3"
    )
    assert HostState.parse("h0 none") == HostState("h0", "none", None, "")


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    strategies.lists(
        strategies.text(strategies.sampled_from("a =\n\r\\\t'\"é\u2028$"), min_size=1),
        min_size=1,
        max_size=3,
    )
)
def test_a_run_is_recognised_whatever_its_arguments_hold(values):
    arguments = [f"--config.task.x={value}" for value in values]
    assert ran(*arguments) == on_one_line(arguments) + "\n"
    assert on_one_line(arguments) != on_one_line([*arguments, "--config.seed=1"])
    assert on_one_line(["--a=x", "--b=y"]) != on_one_line(["--a=x --b=y"])


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a ", "\\n", "a\u2028b"])
def test_an_override_with_a_line_break_is_the_same_run(monkeypatch, value):
    arguments = [*ARGUMENTS, f"--config.x={value}"]
    monkeypatch.setitem(globals(), "ARGUMENTS", arguments)
    cloud = Cloud(["READY"], [GOING, DONE])
    assert train(cloud, arguments) == 0
    assert not cloud.done("host.sh pod start")


def test_an_unhealthy_slice_is_waited_for_and_then_made_again():
    ill = "READY\tUNHEALTHY_MAINTENANCE"
    states = ["READY\tHEALTHY"] * 2 + [ill] * 3 + ["READY\tHEALTHY"]
    cloud = Cloud(states, [NONE, GOING, GOING, DONE])
    assert train(cloud) == 0
    assert "pod: READY, UNHEALTHY_MAINTENANCE" in cloud.said
    assert not cloud.done("tpu-vm delete")
    states = ["READY"] * 2 + ["READY\tTIMEOUT"] * (MAX_ILL + 1) + ["ABSENT", "CREATING", "READY"]
    cloud = Cloud(states, [NONE, *[GOING] * (MAX_ILL + 1), DONE])
    assert train(cloud) == 0
    assert cloud.done("tpu-vm delete") == cloud.done("tpu-vm create") == 1
    assert "pod is TIMEOUT; creating it again" in cloud.said


@pytest.mark.parametrize("state", ["HIDING", "UNHIDING", "STOPPING", "SOMETHING_NEW"])
def test_states_that_pass_are_waited_for(state):
    cloud = Cloud(["READY", "READY", state, state, "READY"], [NONE, GOING, DONE])
    assert train(cloud) == 0
    assert f"pod: {state}" in cloud.said
    assert not cloud.done("tpu-vm create")


def test_a_slice_that_a_repair_has_lost_is_made_again():
    cloud = Cloud(["READY", "READY", "UNKNOWN", "UNKNOWN", "DELETING", "ABSENT", "READY"],
                  [NONE, GOING, DONE])  # fmt: skip
    assert train(cloud) == 0
    assert cloud.done("tpu-vm delete") == 1


def test_a_slice_that_somebody_has_stopped_is_told_how_to_start():
    with pytest.raises(UserError, match=r"pod is STOPPED; gcloud .* tpu-vm start pod --zone=z"):
        train(Cloud(["READY", "READY", "STOPPED"], [NONE, GOING]))


class Partly(Cloud):
    """A cloud in which a host does not answer: gcloud is ended, and the other has been read."""

    def ask_all(self, commands, pretend="", seconds=None, *look):
        told = super().ask_all(commands, pretend, seconds, *look)
        if "h1" in told or " state;" not in " ".join(commands[0]):
            return told
        raise Failed("gcloud took longer than 90 s", told)


def test_a_host_that_does_not_answer_is_named_waited_for_and_then_replaced():
    both = "h0 running step 3\nh1 running step 3"
    hosts = ["h0 none\nh1 none", both, "h0 running step 4", "h0 running step 4", both]
    cloud = Partly(["READY"], [*hosts, "h0 ended 0\nh1 ended 0"])
    assert train(cloud) == 0
    assert cloud.said.count("hosts of pod: h1 does not answer") == 1
    assert not cloud.done("tpu-vm delete")
    alone = ["h0 running step 4"] * (MAX_ILL + 1)  # At first there is progress.
    states = ["READY"] * (MAX_ILL + 4) + ["ABSENT", "CREATING", "READY"]
    cloud = Partly(states, ["h0 none\nh1 none", both, *alone, "h0 ended 0\nh1 ended 0"])
    assert train(cloud) == 0
    assert "pod: h1 does not answer; creating it again" in cloud.said
    assert cloud.done("tpu-vm delete") == cloud.done("tpu-vm create") == 1


def test_without_capacity_create_asks_again_with_longer_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(hosts_launcher.time, "sleep", pauses.append)

    class Full(Cloud):
        def run(self, command, seconds=None, tolerate=()):
            super().run(command)
            if self.done("create") < 4:
                raise UserError("There is no more capacity in the zone")

    cloud = Full(["CREATING", "READY"])
    cloud_tpu(SLICES, cloud, 100).create()
    assert pauses[:3] == [100, 200, 300]
    with pytest.raises(UserError, match="tpu-vm create failed"):  # For another reason.
        cloud_tpu(SLICES, Cloud(["ABSENT"], failures={"tpu-vm create": 1}), 0).create()


def test_slices_that_are_deleted_in_another_terminal_are_not_created_again():
    slices_lib.remember(SLICES)
    cloud = Cloud(["READY", "READY", "PREEMPTED"], [NONE, GOING])
    look = cloud._next

    def deletes(items):
        if items is cloud.states and len(items) == 1:
            cloud_tpu(SLICES, Cloud(["READY"]), 0).delete()
        return look(items)

    cloud._next = deletes
    with pytest.raises(UserError, match="pod was deleted; python -m vit_jax tpu create it first"):
        train(cloud)
    assert not cloud.done("tpu-vm create")


def test_slices_that_are_deleted_while_there_is_no_capacity_are_not_requested_again():
    slices_lib.remember(SLICES)
    cloud = Cloud(["PREEMPTED", "ABSENT"])
    run, cloud.run = cloud.run, lambda command, *_: full(command)

    def full(command):
        run(command)
        slices_lib.forget("pod")
        raise UserError("There is no more capacity in the zone")

    with pytest.raises(UserError, match="pod was deleted"):
        train(cloud)
    assert cloud.done("tpu-vm create") == 1


@pytest.mark.parametrize(
    ("error", "requests"),
    [("PERMISSION_DENIED: tpu.nodes.create", 1), ("Quota exceeded", MAX_UNREACHED + 1)],
)
def test_what_would_come_again_is_not_requested_for_ever(error, requests):
    cloud = Cloud(["PREEMPTED", "ABSENT"])
    run = cloud.run

    def refuses(command, *_):
        run(command)
        raise UserError(error)

    cloud.run = refuses
    with pytest.raises(UserError, match=error):
        train(cloud)
    assert cloud.done("tpu-vm create") == requests


def test_what_a_failed_request_left_is_deleted_before_another_is_made():
    slices_lib.remember(dataclasses.replace(SLICES, type="v4-16"))
    cloud = Cloud(["ABSENT", "READY"])
    cloud_tpu(SLICES, cloud, 0).create()
    assert [" ".join(command.split()[3:5]) for command in cloud.commands] == [
        "tpu-vm describe", "tpu-vm delete", "tpu-vm create", "tpu-vm describe"
    ]  # fmt: skip


def test_slices_that_never_came_to_be_are_forgotten_and_others_kept():
    slices_lib.remember(SLICES)
    shell = Shell()
    shell._call = lambda *_, **__: (1, "", "ERROR: PERMISSION_DENIED")
    with pytest.raises(UserError, match="PERMISSION_DENIED"):
        cloud_tpu(SLICES, shell, 0).delete()
    assert slices_lib.recall("pod") == SLICES
    shell._call = lambda *_, **__: (1, "", "ERROR: NOT_FOUND: Resource 'pod' was not found")
    cloud_tpu(SLICES, shell, 0).delete()
    assert slices_lib.recall("pod") is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"name": "pod", "later": 3}', '{"name": 3}', '{"slices": "x"}', "\xff"]
)
def test_a_damaged_description_of_slices_is_told_in_one_line(tmp_path, capsys, text):
    slices_lib.remember(SLICES)
    (file,) = tmp_path.rglob("pod.json")
    file.write_text(text, encoding="latin-1")
    assert main(["tpu", "status", "pod"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: this is no description of slices (")


def test_a_check_leaves_a_run_that_is_going_alone():
    cloud = Cloud(["READY"], [GOING])
    with pytest.raises(UserError, match=r"a run is going on pod, .* tpu stop pod"):
        cloud_tpu(SLICES, cloud, 0).check("")
    assert not cloud.done("scp")


def test_an_unhealthy_slice_whose_run_makes_progress_or_is_done_is_left_alone():
    steps = [f"h0 running step {n}" for n in range(3 * MAX_ILL)]
    cloud = Cloud(["READY", "READY", "READY\tTIMEOUT"], [NONE, *steps, DONE])
    assert train(cloud) == 0
    assert not cloud.done("tpu-vm delete")


def test_an_unhealthy_slice_of_which_no_host_answers_is_made_again():
    states = ["READY"] * 2 + ["READY\tTIMEOUT"] * (MAX_ILL + 1) + ["ABSENT", "CREATING", "READY"]
    cloud = Cloud(states, [NONE, GOING, *[UserError("no route")] * MAX_ILL, DONE])
    assert train(cloud) == 0
    assert "pod: no host answers; creating it again" in cloud.said


def test_an_illness_is_waited_out_for_half_an_hour(monkeypatch):
    monkeypatch.setattr(hosts_launcher.time, "sleep", lambda seconds: None)
    states = ["READY"] * 2 + ["READY\tTIMEOUT"] * 29 + ["READY"]
    cloud = Cloud(states, [NONE, *[GOING] * 30, DONE])
    assert cloud_tpu(SLICES, cloud, 60).train(ARGUMENTS, "/shared", None) == 0
    assert not cloud.done("tpu-vm delete")
