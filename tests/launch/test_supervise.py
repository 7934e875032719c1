"""A parent starts a run again where it was cut short, and only there."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vit_jax.launch import supervise

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def child(tmp_path, monkeypatch):
    """`child(code, ...)` makes `python -m vit_jax` end that way, one way after the other.

    A negative number ends it by that signal; the last one repeats.
    """
    fake = tmp_path / "python"
    calls = tmp_path / "calls"

    def make(*codes):
        fake.write_text(f"""#!/bin/sh
echo "$@" >> {calls}
codes="{" ".join(map(str, codes))}"
set -- $codes
shift $(($(wc -l < {calls}) <= $# ? $(wc -l < {calls}) - 1 : $# - 1))
case $1 in -*) kill $1 $$ ;; *) exit $1 ;; esac
""")
        fake.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(fake))
        return calls

    return make


def run(restarts):
    pauses = []
    code = supervise.run(["train", "--restarts=0"], restarts, pause=pauses.append)
    return code, pauses


def test_starts_again_after_75_and_after_a_lost_process(child, capfd):
    calls = child(75, -6, 75, 0)
    code, pauses = run(5)
    assert code == 0
    assert pauses == [2.0, 4.0, 8.0]
    expected = f"-m vit_jax.launch.child {os.getpid()} train --restarts=0"
    assert calls.read_text().splitlines() == [expected] * 4
    said = capfd.readouterr().err
    assert "ended by SIGABRT: another process of this run was lost" in said
    assert "starting again (3 of 5)" in said


@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_would_happen_again_is_not_tried_again(child, code):
    calls = child(code)
    assert run(5) == (code, [])
    assert len(calls.read_text().splitlines()) == 1


def test_gives_up_after_so_many_in_a_row(child, capfd):
    child(-9)
    assert run(2) == (75, [2.0, 4.0])
    said = capfd.readouterr().err
    assert "ended by SIGKILL" in said
    assert "cut short 3 times in a row; giving up" in said


def test_a_long_life_starts_the_count_anew(child, monkeypatch):
    child(75, 75, 75, 0)
    monkeypatch.setattr(supervise, "LONG_SECONDS", -1.0)
    assert run(1) == (0, [2.0, 2.0, 2.0])


def test_a_signal_before_a_restart_ends_the_run(child):
    calls = child(75)
    code = supervise.run(["train"], 3, pause=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert code == 75
    assert len(calls.read_text().splitlines()) == 1


CHILD = """
import signal, sys
from vit_jax.launch import child
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
child.end_with(PARENT)
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_parent_stops_the_child_for_good(tmp_path, ended):
    """Also when the parent is killed and can pass nothing on."""
    fake, said = tmp_path / "python", tmp_path / "said"
    program = CHILD.replace("PARENT", "int(sys.argv[1])")
    (tmp_path / "child.py").write_text(program)
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/child.py "$3" >>{said}\n')
    fake.chmod(0o755)
    code = (
        f"import sys; sys.executable = {str(fake)!r}\n"
        "from vit_jax.launch import supervise; sys.exit(supervise.run(['train'], 3))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(said, "ready")
    parent.send_signal(ended)
    assert parent.wait(timeout=30) == (75 if ended == signal.SIGTERM else -9)
    wait_for(said, "saved")
    assert said.read_text().split() == ["ready", "saved"]


def test_a_signal_while_the_child_is_being_made_reaches_it(monkeypatch):
    sent = []

    class Child:
        def __init__(self, *_, **__):
            os.kill(os.getpid(), signal.SIGTERM)

        def send_signal(self, number):
            sent.append(number)

        def wait(self):
            return 75

    monkeypatch.setattr(supervise.subprocess, "Popen", Child)
    assert supervise.run(["train"], 5) == 75
    assert sent == [signal.SIGTERM]


def test_a_signal_ends_the_pause_before_a_restart():
    began = time.monotonic()
    with supervise._Forwarding() as forwarding:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        forwarding.pause(60)
    assert time.monotonic() - began < 30


def test_a_signal_without_a_name_is_told_by_its_number(capfd):
    assert supervise._exit_code(-40) == 75
    assert "ended by signal 40;" in capfd.readouterr().err


def wait_for(path, word):
    deadline = time.monotonic() + 30
    while not (path.exists() and word in path.read_text()):
        assert time.monotonic() < deadline, f"no {word!r} in {path}"
        time.sleep(0.02)


def test_pauses_double_up_to_a_minute_however_many_restarts():
    assert [supervise.pause_seconds(n) for n in (1, 2, 5, 6, 5000)] == [2.0, 4.0, 32.0, 60.0, 60.0]
