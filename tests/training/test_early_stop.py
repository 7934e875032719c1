"""A run whose metric no longer improves ends, at the same step however often it is resumed."""

import pytest

from vit_jax.config import default_config
from vit_jax.errors import Interrupted, UserError
from vit_jax.tracking import read_metrics
from vit_jax.training.early_stop import EarlyStop
from vit_jax.training.evaluate import Abandoned, Evaluator
from vit_jax.training.loop import Trainer, train


def stop(patience=2, metric="val/accuracy"):
    config = default_config()
    config.stop.update(metric=metric, patience=patience)
    return EarlyStop.of(config)


@pytest.mark.parametrize(
    ("metric", "values", "ends"),
    [
        ("val/accuracy", [0.1, 0.3, 0.2, 0.3], 4),
        ("val/accuracy", [0.1, 0.1, 0.2, 0.1, 0.2], 5),
        ("val/loss", [3.0, 2.0, 2.5, 1.0, 1.0, 1.0], 6),
        ("val/loss", [float("nan"), float("nan")], 2),
        ("val/accuracy", [0.1, 0.2, 0.3], None),
    ],
)
def test_a_run_ends_after_as_many_evaluations_without_a_better_value(metric, values, ends):
    early = stop(metric=metric)
    for number, value in enumerate(values, 1):
        early.update({metric: value})
        again = stop(metric=metric)
        again.restore(early.state)  # As a resumed run does.
        assert early.is_over == again.is_over == (number == ends)
        early.update(None)
    assert bool(early.lines(7)) == (ends is not None)
    assert list(early.steps(range(3))) == ([] if ends else [0, 1, 2])


def test_another_metric_begins_anew():
    early, other = stop(patience=1, metric="val/accuracy"), stop(patience=1, metric="val/loss")
    for _ in range(2):
        early.update({"val/accuracy": 0.5})
    assert early.is_over
    other.restore(early.state)
    assert not other.is_over
    other.update({"val/loss": 0.9})
    assert other.state["best"] == 0.9


def test_what_stop_cannot_be():
    for metric, patience in (("", 3), ("val/accuracy", 0)):
        with pytest.raises(UserError, match=r"config.stop needs both: metric"):
            stop(patience, metric)
    with pytest.raises(UserError, match=r"config.stop.metric='val/size': the task does not say"):
        stop(metric="val/size")
    with pytest.raises(UserError, match=r"stop.metric='val/accuracy' is no metric; did you mean"):
        stop().update({"val/acuracy": 0.5})
    early = EarlyStop.of(default_config())
    early.update({"val/accuracy": 0.5})
    assert not early.is_over


STOPPING = {
    "model__depth": 0,
    "model__position": "none",
    "eval__every": 2,
    "checkpoint__every": 2,
    "stop__metric": "val/accuracy",
}


@pytest.mark.usefixtures("one_device")
def test_a_resumed_run_ends_at_the_same_step(tiny_config, tmp_path, monkeypatch):
    """Nothing improves; evaluations are after steps 2, 4, 6, ..."""

    def evaluate(self, params, *, suffix="", **_):
        return {f"val{suffix}/accuracy": 0.5}

    monkeypatch.setattr(Evaluator, "run", evaluate)
    config = tiny_config(**STOPPING, stop__patience=2)
    save = Trainer.save

    def save_and_die(self, at, *args, **keys):
        save(self, at, *args, **keys)
        self.store.wait()
        if at == 4:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_and_die)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, str(tmp_path))
    train(config, str(tmp_path))
    assert (tmp_path / "DONE").read_text() == "step 6\n"
    steps = [row["step"] for row in read_metrics(tmp_path) if "eval/val/accuracy" in row]
    assert steps == [2, 4, 6]


@pytest.mark.usefixtures("one_device")
def test_a_run_that_an_owed_evaluation_ended_stays_finished(
    tiny_config, tmp_path, monkeypatch, capsys
):
    """A signal arrives during the evaluation after step 4; nothing improves after step 2."""
    calls = []

    def evaluate(self, params, *, suffix="", **_):
        calls.append(suffix)
        if len(calls) == 2:
            raise Abandoned
        return {f"val{suffix}/accuracy": 0.5}

    monkeypatch.setattr(Evaluator, "run", evaluate)
    config = tiny_config(**STOPPING, stop__patience=1, ema_decay=0)
    with pytest.raises(Interrupted, match="saved step 4"):
        train(config, str(tmp_path))
    train(config, str(tmp_path))
    assert (tmp_path / "DONE").read_text() == "step 4\n"
    assert len(calls) == 3
    outcome = train(config, str(tmp_path))
    assert len(calls) == 3
    assert outcome.results == {"val/accuracy": 0.5}
    assert "was finished before, at step 4; nothing is trained" in capsys.readouterr().err
