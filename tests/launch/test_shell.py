"""The time limits of commands, and a launcher that is never silent."""

import subprocess
import time
from pathlib import Path

import pytest

from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.launch import shell as shell_lib
from vit_jax.launch.backends import compute_engine
from vit_jax.launch.shell import Each, Failed, Shell
from vit_jax.launch.slices import Slices


def test_a_limit_ends_a_command_with_all_that_it_has_started(tmp_path):
    script = f"sleep 60 & echo $! >{tmp_path}/pid; echo h0 answered; wait"
    with pytest.raises(Failed, match=r"bash -c .* took longer than 0.5 s") as caught:
        Shell().ask(["bash", "-c", script], seconds=0.5)
    assert caught.value.output == "h0 answered\n"
    child = (tmp_path / "pid").read_text().strip()
    deadline = time.monotonic() + 10
    while subprocess.run(["kill", "-0", child], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline


def test_answers_are_kept_where_another_host_fails():
    good, bad = ["echo", "h0 running"], ["bash", "-c", "echo h1 running; echo error: no >&2; false"]
    with pytest.raises(Failed, match="failed: error: no") as caught:
        Shell().ask_all([bad, good])
    assert sorted(caught.value.output.split("\n")) == ["", "h0 running", "h1 running"]


def test_a_command_for_each_host_of_a_list():
    each = Each(["printf", "a\\nb\\n"], lambda host: ["echo", f"{host}:", "it's"])
    assert Shell().ask_all([each]) == "a: it's\nb: it's\n"
    done = subprocess.run(["bash", "-c", each.text()], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == ["a: it's", "b: it's"]


def test_a_list_without_hosts_has_nothing_to_run_and_no_state():
    each = Each(["true"], lambda host: ["echo", host])
    assert Shell().ask_all([each]) == ""
    slices = Slices("pod", "z", type="v6e-8", backend="compute_engine", project="p")
    shell = Shell()
    shell._call = lambda *_, **__: (0, "", "")
    group = compute_engine.launcher(slices, shell, 0)
    group.stop()
    with pytest.raises(UserError, match="no host of pod tells its state"):
        group.hosts.answers()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Failed("pod became PREEMPTED")])
def test_an_interruption_or_a_look_ends_all_commands_at_once(tmp_path, monkeypatch, error):
    """Without waiting for their time limits; commands that have not begun do not begin."""
    script = f"echo begun; echo $$ >>{tmp_path}/pids; sleep 60 & wait"
    commands = [["bash", "-c", script]] * 5

    def look():
        if (tmp_path / "pids").exists():
            raise error

    monkeypatch.setattr(shell_lib, "CONNECTIONS", 4)
    started = time.monotonic()
    with pytest.raises(type(error)) as caught:
        Shell().ask_all(commands, seconds=3600, look=look, every=0.05)
    assert time.monotonic() - started < 30
    pids = (tmp_path / "pids").read_text().split()
    assert 1 <= len(pids) <= 4
    assert not any(Path("/proc", pid).exists() for pid in pids)
    assert "begun" in getattr(caught.value, "output", "begun")


def test_errors_that_do_not_matter_are_passed_over():
    failing = ["bash", "-c", "echo the policy already exists >&2; exit 1"]
    Shell().run(failing, tolerate=("already exists",))
    with pytest.raises(UserError, match="already exists"):
        Shell().run(failing)


def test_a_launcher_that_waits_says_what_for(capsys):
    shell = Shell()
    with shell.never_silent("pod", seconds=0.1):
        shell.ask(["sleep", "0.4"])
        time.sleep(0.3)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "pod: nothing new; waiting for sleep 0.4"
    assert said[-1] == "pod: nothing new; waiting for the next look at its state"
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("action", ["create", "check", "status", "stop", "delete"])
def test_no_action_is_silent_for_long(action, cloud, capsys, monkeypatch):
    """Also those that do not watch a run, such as a request that takes an hour."""
    monkeypatch.setattr(Shell.never_silent.__wrapped__, "__defaults__", (0.1,))
    monkeypatch.setattr(Shell, "_call", lambda self, *_, **__: time.sleep(0.4) or (0, "READY", ""))
    main(["tpu", action, "pod", "--zone=z", "--type=v4-8", "--poll=0"])
    assert "pod: nothing new; waiting for" in capsys.readouterr().err
