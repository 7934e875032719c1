"""The meaning of metrics is declared by tasks, and not guessed from names."""

import logging
import math

import pytest

from vit_jax import tasks
from vit_jax.errors import UserError
from vit_jax.tracking import Metric, headline
from vit_jax.tracking.metrics import (
    BEFORE_DECLARATIONS,
    COUNT,
    LOSS,
    PROBES,
    SCORE,
    as_json,
    best_metric,
    declared,
    from_json,
    meaning,
)

INFO = {
    "rmse": Metric(higher_is_better=False, unit="pixels"),
    "gain": Metric(higher_is_better=True),
    "iou/*": SCORE,
    "iou/worst": LOSS,
    "num_examples": COUNT,
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rmse", "rmse"),
        ("val/rmse", "rmse"),
        ("eval/val_ema/rmse", "rmse"),
        ("eval/a/b/rmse", "rmse"),
        ("val/iou/road", "iou/*"),
        ("val/iou/rmse", "iou/*"),
        ("val/iou/[x]*", "iou/*"),
        ("val/iou/worst", "iou/worst"),
    ],
)
def test_a_declaration_is_found_with_or_without_the_split(name, expected):
    assert declared(name, INFO) is INFO[expected]


@pytest.mark.parametrize("split", ["iou", "ap", "APx"])
def test_the_name_of_a_split_tells_nothing_of_a_metric(split):
    info = {"iou/*": SCORE, "ap*": SCORE, "AP*": SCORE, "loss": LOSS, "num_examples": COUNT}
    for name in (f"{split}/%s", f"eval/{split}/%s", f"{split}_ema/%s"):
        assert declared(name % "loss", info) == LOSS
        assert declared(name % "num_examples", info) == COUNT
    assert declared(f"{split}/mae", info) is None


def test_of_undeclared_names_only_loss_tells_a_direction():
    assert declared("val/mae", INFO) is None
    assert meaning("val/mae", INFO) == Metric()
    assert meaning("val/dice_loss", INFO).higher_is_better is False
    assert meaning("val/accuracy", {}) == Metric()


@pytest.mark.parametrize(
    ("name", "best_is", "is_higher"),
    [
        ("val/rmse", "", False),
        ("val/gain", "", True),
        ("val/iou/road", "", True),
        ("val/mae", "lowest", False),
        ("val/rmse", "highest", True),
    ],
)
def test_the_best_is_what_the_task_or_the_config_says(name, best_is, is_higher):
    assert best_metric(name, INFO, best_is).higher_is_better is is_higher


def test_no_metric_to_keep_the_best_by():
    assert best_metric("", INFO, "") is None


@pytest.mark.parametrize(
    ("name", "info", "best_is", "message"),
    [
        ("val/rmsee", INFO, "", "did you mean 'val/rmse'.*best_is=highest or lowest"),
        ("val/mae", {}, "", "declares no metrics.*best_is"),
        ("val/num_examples", INFO, "", "best_is"),
        ("val/mae", {}, "smallest", "write highest or lowest"),
    ],
)
def test_a_direction_that_nothing_tells_is_asked_for(name, info, best_is, message):
    with pytest.raises(UserError, match=message):
        best_metric(name, info, best_is)


def test_a_direction_inferred_from_a_name_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert best_metric("val/dice_loss", {}, "").higher_is_better is False
        assert best_metric("val/loss", {"loss": LOSS}, "").higher_is_better is False
    assert [record.getMessage().count("val/dice_loss") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        (SCORE, [0.5, 0.7, 0.6], 0.7),
        (LOSS, [0.5, 0.7, 0.4], 0.4),
        (SCORE, [math.nan, 0.1, math.nan], 0.1),
        (LOSS, [math.nan, math.inf, 3.0], 3.0),
        (LOSS, [math.nan], None),
        (COUNT, [1, 2], None),
    ],
)
def test_the_best_of_several_values(metric, values, best):
    found = None
    for value in values:
        found = value if metric.is_better(value, found) else found
    assert found == best


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        (SCORE, 0.95833, "95.83%"),
        (LOSS, 12.5, "12.5"),
        (Metric(unit="pixels"), 3.25, "3.25 pixels"),
        (COUNT, 12345, "12,345"),
        (LOSS, math.nan, "nan"),
        (COUNT, math.inf, "inf"),
    ],
)
def test_values_are_written_in_their_unit(metric, value, text):
    assert metric.text(value) == text


def test_declarations_survive_json():
    found = from_json(as_json(INFO))
    assert {name: found[name] for name in INFO} == INFO
    assert found["train/mfu"].unit == "fraction"


@pytest.mark.parametrize("stored", [[], 5, "x", {"a": 1, "b": {"higher_is_better": "yes"}}])
def test_what_is_no_declaration_is_left_out(stored):
    assert not {"a", "b"} & from_json(stored).keys()
    assert "AP*" not in from_json(stored)


def test_runs_from_before_declarations_have_those_of_their_time():
    assert meaning("eval/val/top5_accuracy", from_json(None)) == SCORE


LATER = {"f1", "ece", "accuracy/*", *PROBES}  # Metrics that no run without declarations has.


@pytest.mark.parametrize("name", ["classification", "contrastive", "detection", "segmentation"])
def test_our_tasks_declare_their_headline(name):
    task = tasks.metric_info(name)
    assert declared(tasks.TASKS.find(name, "config.task.name").headline, task) == SCORE
    assert declared("num_examples", task) == COUNT
    earlier = task.keys() - LATER
    names = {n: f"val/{n.replace('*', 'x')}" for n in earlier}
    assert all(meaning(names[n], BEFORE_DECLARATIONS) == task[n] for n in earlier)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/loss"], None),
        (["eval/val/loss", "eval/val/num_examples"], None),
        (["eval/val/loss", "eval/val/miou"], "eval/val/miou"),
        (["eval/val/accuracy", "eval/val/miou"], "eval/val/miou"),
        (["eval/val/miou", "eval/val_ema/miou"], "eval/val_ema/miou"),
        (["eval/a/miou", "eval/b/miou"], "eval/a/miou"),
        (["val/miou", "val_ema/miou"], "val_ema/miou"),
    ],
)
def test_the_headline_is_the_tasks_own_of_averaged_parameters(names, expected):
    assert headline("miou", names) == expected
