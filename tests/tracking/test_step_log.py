"""Rows of training steps, by a clock that the test sets: which steps have one, and their speeds."""

import types

import jax.numpy as jnp
import pytest

from vit_jax.tracking import read_metrics, step_log
from vit_jax.tracking.step_log import StepLog, Stopwatch

METRICS = {"loss": jnp.float32(1), "bad_steps": jnp.int32(0)}


def test_speed_and_input_wait_are_those_since_the_row_before_without_pauses(tmp_path, monkeypatch):
    now = 0.0
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(step_log, "time", clock)
    with StepLog(
        tmp_path, start_step=0, total=5, every=2, batch_size=8, max_skipped_steps=0, is_writer=True
    ) as log:
        log.step(1, METRICS, 0.0)
        now = 1.0  # The first step ends, and the second one begins.
        log.step(2, METRICS, 0.5)
        now = 3.0
        log.step(3, METRICS, 1.0)
        with log.paused():
            now = 13.0
        now = 15.0
        log.step(4, METRICS, 2.5)
        now = 18.0
        log.step(5, METRICS, 3.0)
        now = 22.0
        log.flush()
    rows = {row["step"]: row for row in read_metrics(tmp_path)}
    assert list(rows) == [1, 2, 4, 5]
    assert "train/images_per_sec" not in rows[1]
    # Seconds without pauses: 1 step in 2, 2 steps in 15 - 10, and 1 step in 4.
    expected = {2: (4.0, 0.5 / 2), 4: (3.2, 2.0 / 5), 5: (2.0, 0.5 / 4)}
    for at, (speed, waiting) in expected.items():
        assert rows[at]["train/images_per_sec"] == pytest.approx(speed)
        assert rows[at]["train/input_wait_fraction"] == pytest.approx(waiting)


def test_seconds_in_place_of_a_part_are_not_counted_in_it(monkeypatch):
    now = 0.0
    monkeypatch.setattr(step_log, "time", types.SimpleNamespace(monotonic=lambda: now))
    times = Stopwatch()
    times.add("compile", 1.0)
    with times("train"):
        now = 2.0
        with times.in_place_of("train", "compile"):
            now = 7.0
        now = 10.0
    assert times.seconds == {"compile": 6.0, "train": 5.0}


def test_a_speed_may_be_measured_from_a_step_without_a_row(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(step_log, "time", types.SimpleNamespace(monotonic=lambda: now))
    with StepLog(
        tmp_path, start_step=0, total=4, every=9, batch_size=8, max_skipped_steps=0, is_writer=True
    ) as log:
        log.step(1, METRICS, 0.0)
        log.step(2, METRICS, 0.0)
        now = 100.0
        log.measure_from(2, 1.0)
        log.step(3, METRICS, 1.0)
        log.step(4, METRICS, 2.0)
        now = 104.0
        log.flush()
    row = read_metrics(tmp_path)[-1]
    assert row["train/images_per_sec"] == 4.0
    assert row["train/input_wait_fraction"] == 0.25
