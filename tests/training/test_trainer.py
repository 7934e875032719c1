"""The loop between its steps: what it hands to the checkpoints, the log and the evaluation."""

import types

import jax
import jax.numpy as jnp
import pytest

from vit_jax.tracking.step_log import Stopwatch
from vit_jax.training import loop
from vit_jax.training.evaluate import Abandoned


class Log:
    """Notes the calls that put rows on disk."""

    def __init__(self, called):
        self.called = called

    def __getattr__(self, name):
        return lambda *args: self.called.append(name)

    def paused(self, note=""):
        return Stopwatch()("paused")


@pytest.fixture
def trainer():
    """A trainer at step 7 without a model; `called` lists what it asked of its parts, in order."""
    called = []
    state = types.SimpleNamespace(
        step=jnp.int32(7), params="params", ema=None, bad_steps=jnp.int32(0), losses=None
    )
    parts = types.SimpleNamespace
    made = loop.Trainer(
        run=parts(
            config=parts(log=parts(pictures=True)),
            task=parts(headline="accuracy"),
            evaluation_params=lambda state: state.params,
            num_params=lambda: 1,
        ),
        stages=None,
        evaluator=parts(splits=["val"]),
        store=parts(save=lambda *args: called.append(("save", *args))),
        log=Log(called),
        times=Stopwatch(),
        stop=parts(asked=lambda: True, name="SIGTERM"),
        workdir=parts(path="workdir"),
        lock=parts(check=lambda: called.append("lock")),
        state=state,
        profiler=None,
        best=parts(state=dict, early=parts(lines=lambda at: [], update=called.append)),
    )
    made.called = called
    return made


def test_all_rows_so_far_are_durable_before_a_checkpoint_says_that_they_are_past(trainer):
    trainer.save(7, {"val/accuracy": 0.5}, owes_evaluation=False)
    names = [call if isinstance(call, str) else call[0] for call in trainer.called]
    assert names == ["flush", "lock", "check", "sync", "save", "saved"]


def test_a_checkpoint_counts_the_time_of_parts_that_still_run(trainer):
    with trainer.times("train"):
        trainer.save(7, None, owes_evaluation=True)
    (saved,) = (call for call in trainer.called if call[0] == "save")
    _, at, state, metadata, metrics = saved
    assert (at, state, metrics) == (7, trainer.state, None)
    assert metadata["owes_evaluation"]
    assert metadata["seconds"]["train"] > 0


@pytest.mark.parametrize(("processes", "may_leave"), [(1, True), (2, False)])
def test_only_a_process_that_is_alone_leaves_an_evaluation(
    trainer, monkeypatch, processes, may_leave
):
    """The others would wait for it for ever."""

    def evaluate(params, *, should_stop):
        if should_stop():
            raise Abandoned
        return {"val/accuracy": 0.5}

    monkeypatch.setattr(jax, "process_count", lambda: processes)
    trainer.evaluator.run = evaluate
    assert trainer.evaluate(7) == (None if may_leave else {"val/accuracy": 0.5})


@pytest.mark.parametrize(
    ("ema", "teacher", "student"),
    [(None, None, None), ("average", None, None), (None, "teacher", "params")],
)
def test_pictures_are_of_the_parameters_that_are_published(
    trainer, monkeypatch, ema, teacher, student
):
    drawn = []

    def draw(*args, student):
        drawn.append((args[3], student))

    monkeypatch.setattr(loop.pictures, "write_sections", draw)
    trainer.state.ema, trainer.state.params = ema, "params"
    trainer.state.task_state = {"teacher": teacher} if teacher else None
    assert trainer.finish() == 7
    assert drawn == [(ema or "params", student)]


def test_an_evaluation_that_was_owed_counts_for_the_early_stop(trainer):
    trainer.evaluator.run = lambda params, **_: {"val/accuracy": 0.5}
    for owes in (False, True):
        restored = types.SimpleNamespace(step=7, metadata={"owes_evaluation": owes})
        trainer.run_owed_evaluation(restored)
        assert trainer.called.count({"val/accuracy": 0.5}) == owes
