"""Utilization, goodput, time lost to restarts, memory, stragglers, traces."""

import json
import types

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.parallel import accelerators
from vit_jax.tracking import read_metrics, step_log, utilization
from vit_jax.tracking.step_log import Stopwatch
from vit_jax.tracking.utilization import Monitor, compare_hosts
from vit_jax.training.loop import train
from vit_jax.training.profiling import Profiler
from vit_jax.training.run import Run


@pytest.fixture(scope="module")
def resumed(request, tmp_path_factory, digits_npz, drawing_reports):
    """A run cut short at step 5 and resumed from step 3, with a trace: (workdir, seconds lost)."""
    from vit_jax import config as config_lib

    config = config_lib.load(
        f"{request.config.rootpath}/tests/tiny.py:{digits_npz}",
        {"total": "6", "eval.every": "6"},
    )
    workdir = tmp_path_factory.mktemp("resumed")
    original, count = step_log.StepLog.step, []

    def cut_short(self, at, metrics, waited):
        original(self, at, metrics, waited)
        if at == 5 and not count:
            count.append(at)
            self.flush()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_log.StepLog, "step", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train(config, str(workdir))
    at = {row["step"]: row["train/run_seconds"] for row in read_metrics(workdir) if row["step"] > 1}
    manifest = json.loads((workdir / "checkpoints/3/manifest/metadata").read_text())
    lost = at[5] - step_log.total_seconds(manifest["metadata"]["seconds"])
    with drawing_reports():
        train(config, str(workdir), profile="4:5", started=0.0)
    return workdir, lost


def test_every_part_of_the_time_is_named_and_they_add_up(resumed):
    workdir, lost = resumed
    rows = read_metrics(workdir)
    parts = {name[5:]: value for name, value in rows[-1].items() if name.startswith("time/")}
    assert {"start", "setup", "compile", "train", "lost to restart", *step_log.WITHIN_TRAIN} <= (
        parts.keys()
    )
    assert lost > 0
    assert parts["lost to restart"] == pytest.approx(lost)
    within = sum(parts[name] for name in step_log.WITHIN_TRAIN)
    assert 0 < within < parts["train"]
    seconds = [row["train/run_seconds"] for row in rows if "train/run_seconds" in row]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= sum(parts.values()) - within
    goodput = rows[-1]["train/goodput"]
    assert 0 < goodput <= (parts["train"] - within + 1) / seconds[-1]
    assert "goodput" in (workdir / "report.html").read_text()
    assert "lost to restart" in (workdir / "report.html").read_text()


def test_a_trace_lies_in_the_workdir(resumed):
    workdir, _ = resumed
    traces = list((workdir / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 10_000


def test_cpus_have_no_peak_and_tell_no_memory(resumed):
    names = read_metrics(resumed[0])[-1].keys()
    assert "train/images_per_sec_per_chip" in names
    assert not {"train/mfu", "device/memory_gib"} & names


def test_goodput_is_the_share_of_steps():
    times = Stopwatch()
    times.add_all({"setup": 10, "train": 80, "input wait": 5, "eval": 10, "save": 5, "report": 10})
    assert times.total() == 100
    assert times.goodput() == pytest.approx(0.6)
    with times.gauge("input wait", lambda: 20.0):
        assert times.goodput() == pytest.approx(0.4)
    assert times.seconds["input wait"] == 25


def test_utilization_is_model_flops_over_the_peak(tiny_config):
    run = Run.build(tiny_config())
    model = run.task.model
    assert run.train_flops_per_example() == 3 * models.flops(model, 8, 1)
    row = Monitor("TPU7x", 8, lambda: 3e9, Stopwatch()).row(1000.0, 0.1)
    assert row["train/mfu"] == pytest.approx(1000 * 3e9 / (4 * accelerators.CHIPS["tpu7x"].flops))
    assert row["train/images_per_sec_per_chip"] == 250


def test_what_is_frozen_costs_no_gradient_and_sam_costs_two(tiny_config):
    forward = models.flops(Run.build(tiny_config()).task.model, 8, 1)
    sharp = Run.build(tiny_config(optim__sam_rho=0.1))
    assert sharp.train_flops_per_example() == 6 * forward
    probe = Run.build(tiny_config(optim__freeze=["backbone/.*"]))
    assert forward <= probe.train_flops_per_example() < 1.1 * forward


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    def device(used):
        stats = {
            "bytes_in_use": used * accelerators.GIB,
            "peak_bytes_in_use": 2 * used * accelerators.GIB,
        }
        return types.SimpleNamespace(memory_stats=lambda: stats)

    monkeypatch.setattr(jax, "local_devices", lambda: [device(1), device(3)])
    assert utilization.device_memory() == {"device/memory_gib": 3, "device/peak_memory_gib": 6}


def test_the_host_that_holds_others_up_is_named():
    hosts = np.array([[0.1, 59, 59.5], [0.4, 60, 1.25], [0.0, 60, 0.0]], np.float32)
    assert compare_hosts(hosts) == {
        "hosts/input_wait_fraction_max": pytest.approx(0.4),
        "hosts/longest_input_wait": 1,
        "hosts/arrival_spread_seconds": 1.75,
        "hosts/last_to_arrive": 1,
    }


def test_hosts_on_both_sides_of_a_full_hour_arrive_together():
    hosts = np.array([[0, *utilization._split(at)] for at in (3599.9, 3600.1)], np.float32)
    assert compare_hosts(hosts)["hosts/arrival_spread_seconds"] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("text", ["5", "0:3", "4:3", "a:b", "1:2:3"])
def test_steps_that_cannot_be_traced_are_told(text):
    with pytest.raises(UserError, match="write START:STOP"):
        Profiler.parse(text)
