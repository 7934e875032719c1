"""`tpu check`: what a host measures, and the table that names what is wrong."""

import json
import subprocess

import pytest

from vit_jax.launch import measure
from vit_jax.launch.backends.cloud_tpu import launcher as cloud_tpu
from vit_jax.launch.health import MARK, table
from vit_jax.launch.shell import Failed, Shell
from vit_jax.launch.slices import Slices
from vit_jax.parallel import accelerators

V4_16 = accelerators.parse_slice("v4-16")
VERSIONS = {"jax": "0.8.0", "libtpu": "0.0.30"}


def host(name, **changes):
    """Returns the lines of a healthy host with `changes`; None leaves a line out."""
    found = {
        "versions": VERSIONS,
        "storage": {"write": 200.0, "read": 300.0},
        "chips": [{"kind": "TPU v4", "tflops": 200.0, "right": True}] * 4,
        "all_reduce": {"devices": 8, "gb_per_s": 50.0, "right": True},
    }
    parts = {**found, **changes}.items()
    return "".join(
        f"{MARK}{json.dumps({'host': name, key: value})}\n" for key, value in parts if value
    )


def test_a_slice_that_is_well_is_one_table_without_complaints():
    text, code = table("Welcome to Ubuntu\n" + host("h0") + host("h1"), [], {"h0", "h1"}, V4_16)
    assert code == 0
    head, *rows, versions = text.splitlines()
    assert head.split("  ")[0] == "host"
    assert [row.split() for row in rows] == [
        [name, "4", "200.0", "50.0", "200.0", "300.0", "ok"] for name in ("h0", "h1")
    ]
    assert versions == "jax 0.8.0, libtpu 0.0.30"


def test_a_line_that_was_cut_off_is_passed_over():
    text, code = table(host("h0") + host("h1")[:-9], [], {"h0", "h1"}, V4_16)
    assert code == 1
    assert [line.split()[-1] for line in text.splitlines()[1:3]] == ["ok", "end"]


def chips(*changes):
    return [{"kind": "TPU v4", "tflops": 200.0, "right": True} | change for change in changes]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"chips": chips({}, {}, {})}, "3 of 4 devices"),
        ({"chips": chips({}, {}, {"right": False}, {})}, "device 2: WRONG PRODUCT"),
        ({"chips": chips({}, {"tflops": 90.0}, {}, {})}, "device 1: 90.0 TFLOP/s, others 200.0"),
        ({"versions": {**VERSIONS, "jax": "0.7.0"}}, "jax 0.7.0, others 0.8.0"),
        ({"all_reduce": {"devices": 8, "gb_per_s": 5.0, "right": False}}, "WRONG all-reduce"),
        ({"all_reduce": None}, "the all-reduce did not end"),
        ({"chips": None, "all_reduce": None}, "its chips did not start"),
        ({"error": "gs://b: PermissionDenied: no"}, "gs://b: PermissionDenied: no"),
        (dict.fromkeys(("versions", "storage", "chips", "all_reduce")), "NO ANSWER"),
    ],
)
def test_the_host_that_is_ill_is_named_with_its_illness(changes, verdict):
    told = host("h0") + host("h1", **changes) + host("h2")
    text, code = table(told, [], {"h0", "h1", "h2"}, V4_16)
    assert code == 1
    rows = {row.split()[0]: row for row in text.splitlines()}
    assert rows["h1"].endswith(f"  {verdict}")
    assert rows["h0"].endswith("  ok")


def test_generations_whose_chips_are_two_devices_each_are_counted_so():
    eight = [{"kind": "TPU v3", "tflops": 50.0, "right": True}] * 8
    told, shape = host("h0", chips=eight), accelerators.parse_slice("v3-32")
    assert table(told, [], {"h0"}, shape)[1] == 0
    text, code = table(host("h0", chips=eight[:4]), [], {"h0"}, shape)
    assert code == 1
    assert "4 of 8 devices" in text


def test_a_host_measures_itself(capsys, monkeypatch, tmp_path):
    """On eight virtual devices of this machine."""
    monkeypatch.setattr(measure.chips, "__defaults__", (1,))
    monkeypatch.setattr(measure.storage_rates, "__defaults__", (1000,))
    assert measure.main([f"--workdir={tmp_path / 'new'}"]) == 0
    text, code = table(capsys.readouterr().out, [], set(), None)
    _, devices, *_, verdict = text.splitlines()[1].split()
    assert (code, devices, verdict) == (0, "8", "ok"), text
    assert not list((tmp_path / "new").iterdir())


def test_a_host_that_cannot_measure_says_why(capsys, monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("INTERNAL: chip 2 is on fire\nmore")

    monkeypatch.setattr(measure, "chips", broken)
    (tmp_path / "file").touch()
    assert measure.main([]) == 1
    text, code = table(capsys.readouterr().out, [], set(), None)
    assert code == 1
    assert text.splitlines()[1].endswith("RuntimeError: INTERNAL: chip 2 is on fire")


class Told(Shell):
    """A cloud whose hosts h0 and h1 answer `state` and print `measured`."""

    def __init__(self, states, measured=""):
        super().__init__()
        self.states, self.measured, self.commands = states, measured, []

    def ask(self, command, pretend="", seconds=None, stdin=""):
        text = " ".join(command)
        self.commands.append(text)
        if " describe " in text:
            return "READY"
        if " state;" in text:
            return self.states
        if " measure" in text:
            raise Failed("a host ended with 1", self.measured)
        return ""

    def run(self, command, seconds=None, tolerate=()):
        self.commands.append(" ".join(command))

    def say(self, text):
        pass


@pytest.fixture
def check():
    def run(shell):
        return cloud_tpu(Slices("pod", "z", type="v4-16"), shell, 0).check("gs://b/check")

    return run


def test_check_prepares_measures_and_prints(check, capsys):
    shell = Told("h0 none\nh1 none\n", host("h0") + host("h1", chips=chips({}, {})))
    assert check(shell) == 1
    assert "2 of 4 devices" in capsys.readouterr().out
    assert any("bash host.sh pod measure gs://b/check" in text for text in shell.commands)


def test_a_silent_host_is_named_before_anything_is_measured(check, capsys):
    shell = Told("h1 none\n")
    assert check(shell) == 1
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["h1", "answers"], ["1", "of 2 hosts  NO ANSWER"]]
    assert not any("scp" in text for text in shell.commands)


def test_host_sh_measures_with_the_run_s_own_python(tmp_path):
    """`measure` runs in the environment that `prepare` has made."""
    run = tmp_path / "vit_jax_runs/pod"
    (run / "code").mkdir(parents=True)
    (run / "venv/bin").mkdir(parents=True)
    (run / "venv/bin/python").write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    (run / "venv/bin/python").chmod(0o755)
    from vit_jax.launch.hosts import HOST_SCRIPT

    functions = "hostname() { echo h; }; check_tpu_is_free() { :; }"
    script = f'source "$1"; {functions}; run=$2; measure "gs://b/a b"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", HOST_SCRIPT, run], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{run}/code -m vit_jax.launch.measure --host=h --workdir=gs://b/a b\n"
