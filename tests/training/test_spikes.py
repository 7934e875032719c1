"""Loss spikes: which steps are skipped, what the state remembers, when a run stops."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.checkpoints.store import Store, flatten
from vit_jax.errors import Diverged, UserError
from vit_jax.tracking import read_metrics
from vit_jax.tracking.step_log import StepLog
from vit_jax.training.loop import train
from vit_jax.training.run import Run
from vit_jax.training.spikes import LossHistory, SpikeGuard


def judge(guard, losses, finite=math.isfinite):
    """Runs the guard over losses; returns which were accepted, and the history after them."""
    history, accepted = LossHistory.empty(), []
    for loss in map(jnp.float32, losses):
        fine = guard.accepts(history, loss)
        used = fine & finite(loss)
        history = guard.after(history, loss, fine, used)
        accepted.append(bool(used))
    return accepted, history


def test_a_loss_far_above_the_recent_average_is_skipped():
    guard = SpikeGuard(factor=2.0, window=2, max_skipped=3)
    accepted, history = judge(guard, [1, 3, 3.9, 5, 5.1, 2])
    # Averages: 1, 2, 2.95 after (2 + 3.9) / 2; 5 is below 5.9, the average is then 3.975.
    assert accepted == [True, True, True, True, True, True]
    np.testing.assert_allclose(history.mean, ((((2 + 3.9) / 2 + 5) / 2 + 5.1) / 2 + 2) / 2)
    accepted, history = judge(guard, [1, 3, 4.1, 9, 3])
    assert accepted == [True, True, False, False, True]
    assert (int(history.accepted), int(history.in_a_row), int(history.total)) == (3, 0, 2)
    np.testing.assert_allclose(history.mean, 2.5)


def test_negative_losses_have_a_limit_as_far_above_their_average():
    assert judge(SpikeGuard(2.0, 1, 3), [-1, -1, -0.1, 0.1])[0] == [True, True, True, False]


def test_nothing_is_skipped_before_the_average_means_something():
    assert judge(SpikeGuard(1.5, window=4, max_skipped=1), [1, 100, 1, 100])[0] == [True] * 4


def test_non_finite_steps_are_another_matter():
    accepted, history = judge(SpikeGuard(2.0, 1, 1), [1, math.nan, math.inf, 1])
    assert accepted == [True, False, False, True]
    assert int(history.total) == 0
    np.testing.assert_array_equal(history.mean, 1)


def test_a_step_that_is_not_finite_ends_no_row_of_spikes():
    _, history = judge(SpikeGuard(2.0, 1, max_skipped=9), [1, 5, math.nan, 5])
    assert (int(history.in_a_row), int(history.total)) == (2, 2)
    np.testing.assert_array_equal(history.mean, 1)


def test_too_many_in_a_row_hold_everything_back():
    accepted, history = judge(SpikeGuard(2.0, 1, max_skipped=1), [1, 5, 5, 1, 1])
    assert accepted == [True, False, False, False, False]
    assert int(history.in_a_row) == 4


def test_a_stage_is_judged_by_its_own_losses():
    """Its losses may be larger from its first step on; the spikes of the run count on."""
    guard = SpikeGuard(2.0, window=2, max_skipped=3, start=5)
    old = LossHistory(jnp.float32(1), jnp.int32(4), jnp.int32(1), jnp.int32(1))
    assert not guard.accepts(guard.before(old, jnp.int32(4)), jnp.float32(9))
    first = guard.before(old, jnp.int32(5))
    assert guard.accepts(first, jnp.float32(9))
    assert [int(x) for x in (first.accepted, first.in_a_row, first.total)] == [0, 0, 1]
    later = guard.after(first, jnp.float32(9), jnp.bool(True), jnp.bool(True))
    assert guard.before(later, jnp.int32(6)) == later
    assert SpikeGuard(2.0, 2, 3).before(old, jnp.int32(0)) is old


@pytest.mark.usefixtures("one_device")
def test_a_run_skips_its_spikes_and_says_so(tiny_config, tmp_path):
    guard = {"factor": 1.0005, "window": 3, "max_skipped": 20}
    keys = {f"spikes__{key}": value for key, value in guard.items()}
    config = tiny_config(optim__lr=0.03, model__depth=1, **keys)
    train(config, str(tmp_path))
    rows = read_metrics(tmp_path)
    skipped = 0
    for before, row in itertools.pairwise(rows[2:]):
        is_spike = row["train/loss"] > 1.0005 * before["train/loss_mean"]
        assert (row["train/spikes"] > 0) == is_spike
        skipped += is_spike
    assert 0 < skipped < 9
    assert rows[-1]["train/spikes_total"] == skipped
    run = Run.build(config)
    state = flatten(Store(tmp_path / "checkpoints").restore_newest(run.abstract).tree)
    assert state["opt_state.adamw.count"] == 12 - skipped == state["losses.accepted"]


def test_a_loss_that_stays_up_stops_the_run(tmp_path):
    with StepLog(
        tmp_path, start_step=0, total=9, every=1, batch_size=1, max_skipped_steps=0, max_spikes=2,
        is_writer=False,
    ) as log:  # fmt: skip
        log.check(7, bad_steps=0, spikes=2)
        with pytest.raises(Diverged, match=r"spiked at step 6 and stayed there \(3 steps in a row"):
            log.check(8, bad_steps=0, spikes=3)


def test_a_warning_of_the_task_is_shown_once(tmp_path, capsys):
    with StepLog(
        tmp_path, start_step=0, total=9, every=1, batch_size=1, max_skipped_steps=0,
        is_writer=True, warnings=lambda metrics, at: [f"odd {metrics['loss']}"] if at > 1 else [],
    ) as log:  # fmt: skip
        for at, loss in enumerate((1.0, 2.0, 2.0, 3.0), 1):
            log.step(at, {"loss": jnp.float32(loss), "bad_steps": jnp.int32(0)}, 0.0)
    said = capsys.readouterr().err
    assert said.count("warning: odd 2.0") == 1
    assert "odd 1.0" not in said


@pytest.mark.parametrize("keys", [{"spikes__factor": 0.9}, {"spikes__window": 0}])
def test_settings_that_would_skip_everything_are_refused(tiny_config, keys):
    with pytest.raises(UserError, match=r"config\.spikes"):
        tiny_config(**keys)
