"""Metrics by class, losses for rare classes, and images with several labels."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from vit_jax import tasks
from vit_jax.errors import UserError
from vit_jax.tasks._class_metrics import (
    Reliability,
    average_precision,
    class_metrics,
    class_sums,
    f1_scores,
    top_classes,
)
from vit_jax.types import ArraySpec, DataInfo

MODEL = {"name": "vit", "patch_size": 4, "width": 8, "depth": 1, "num_heads": 2}
LOGITS = np.array([[2.0, 1.0, 0.5], [0.2, -1.0, 1.5], [0.1, 0.2, 0.3]], np.float32)


def build(name="classification", classes=3, label=(), counts=(), **fields):
    spec = {
        "image": ArraySpec((8, 8, 1), np.dtype(np.uint8)),
        "label": ArraySpec(label, np.dtype(np.float32 if label else np.int32)),
    }
    return tasks.build({"name": name, **fields}, MODEL, DataInfo(spec, classes, None, counts))


def answering(task, logits):
    """The task with a model that answers with given logits."""

    class Constant:
        def apply(self, _, images, **__):
            return jnp.asarray(logits)

    return dataclasses.replace(task, model=Constant())


def batch_of(labels, mask=None):
    mask = np.ones(len(labels)) if mask is None else np.array(mask)
    images = np.zeros((len(labels), 8, 8, 1), np.uint8)
    return {"image": images, "label": np.array(labels), "mask": mask.astype(np.float32)}


def test_class_metrics_are_scikit_learns():
    sums = jax.jit(class_sums, static_argnums=4)
    random = np.random.default_rng(0)
    for rows in (0, 1, 7, 24):
        labels, predicted = random.integers(0, 5, (2, 24)).astype(np.int32)
        confidence, scored = random.random(24).astype(np.float32), np.arange(24) < rows
        halves = np.arange(24) < 12
        parts = [
            jax.device_get(sums(labels, predicted, confidence, scored & half, 5))
            for half in (halves, ~halves)
        ]
        found = class_metrics({name: parts[0][name] + parts[1][name] for name in parts[0]})
        if rows:
            check(found, labels[:rows], predicted[:rows], confidence[:rows])


def check(found, labels, predicted, confidence):
    there = np.unique(labels)
    recalls = sklearn.recall_score(labels, predicted, labels=there, average="macro")
    assert found["balanced_accuracy"] == pytest.approx(recalls)
    f1 = sklearn.f1_score(labels, predicted, labels=there, average="macro", zero_division=0)
    assert found["f1"] == pytest.approx(f1)
    error = 0.0
    for low, high in itertools.pairwise(np.linspace(0, 1, 16)):
        here = (confidence > low) & (confidence <= high)
        error += abs((labels == predicted)[here].sum() - confidence[here].sum())
    assert found["ece"] == pytest.approx(error / len(labels), abs=1e-5)
    drawn = Reliability.of(labels == predicted, confidence)
    assert drawn.rows.sum() == len(labels)
    assert drawn.error == pytest.approx(found["ece"], abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 6))
def test_average_precision_is_scikit_learns(seed, rows, classes):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, (rows, classes)).astype(np.uint8)
    scores = random.integers(0, 5, (rows, classes)) / 4  # Many are equal.
    found = average_precision(labels, scores)
    for label in range(classes):
        if labels[:, label].any():
            expected = sklearn.average_precision_score(labels[:, label], scores[:, label])
            assert found[label] == pytest.approx(expected)
        else:
            assert np.isnan(found[label])
    micro, macro = f1_scores(labels, scores > 0.5)
    there = np.flatnonzero(labels.any(0))
    yes = scores > 0.5
    assert micro == pytest.approx(sklearn.f1_score(labels.ravel(), yes.ravel(), zero_division=0))
    if len(there):
        each = [sklearn.f1_score(labels[:, i], yes[:, i], zero_division=0) for i in there]
        assert macro == pytest.approx(np.mean(each))


def test_a_class_that_a_split_lacks_breaks_no_mean():
    task = answering(build(), LOGITS)
    found = task.metrics(jax.device_get(task.eval_sums({}, batch_of([0, 0, -1], [1, 1, 1]))))
    assert found["balanced_accuracy"] == 0.5
    assert found["f1"] == pytest.approx(2 / 3)
    assert np.isfinite(list(found.values())).all()
    json.dumps(found)
    empty = task.metrics(jax.device_get(task.eval_sums({}, batch_of([0, 0, 0], [0, 0, 0]))))
    assert np.isfinite(list(empty.values())).all()


@pytest.mark.parametrize(("classes", "has"), [(5, False), (6, True)])
def test_top5_is_said_of_more_than_five_classes(classes, has):
    task = answering(build(classes=classes), np.zeros((1, classes), np.float32))
    found = task.metrics(jax.device_get(task.eval_sums({}, batch_of([0]))))
    assert ("top5_accuracy" in found) == has


def test_untrained_confidence_stays_in_one_bin():
    """1/3 and 1/5 are edges of bins; the last bit of a sum must not decide."""
    sums = jax.jit(class_sums, static_argnums=4)
    zeros, scored = np.zeros(1, np.int32), np.ones(1, bool)
    for share in np.float32([1 / 3, 1 / 5, 1 / 15]):
        sides = [np.nextafter(share, side) for side in np.float32([0, 1])]
        bins = [sums(zeros, zeros, x[None], scored, 2)["bin_hits"].argmax() for x in sides]
        assert bins[0] == bins[1]


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 2], [9, 3])
    task = build(counts=(9, 0, 3), class_weights="balanced")
    expected = compute_class_weight("balanced", classes=np.array([0, 2]), y=labels)
    np.testing.assert_allclose(task._class_weights()[[0, 2]], expected)
    with pytest.raises(UserError, match="this source does not count its classes"):
        build(class_weights="balanced")
    with pytest.raises(UserError, match=r"class_weights='balance': write balanced, or numbers"):
        build(class_weights="balance")


def loss_of(task, labels, **more):
    batch = {"image": np.zeros((3, 8, 8, 1), np.float32), "label": np.eye(3)[labels], **more}
    return answering(task, LOGITS).loss_fn({}, batch, jax.random.key(0))


def test_focal_loss_is_the_papers():
    share = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    of_label = share[np.arange(3), [0, 1, 2]]
    total, count = loss_of(build(focal_gamma=2.0), [0, 1, 2])
    assert total == pytest.approx(((1 - of_label) ** 2 * -np.log(of_label)).sum(), rel=1e-5)
    assert count == 3
    yes = 1 / (1 + np.exp(-LOGITS))
    of_answer = np.where(np.eye(3) > 0, yes, 1 - yes)
    total, _ = loss_of(build(focal_gamma=2.0, loss="sigmoid"), [0, 1, 2])
    assert total == pytest.approx(((1 - of_answer) ** 2 * -np.log(of_answer)).sum(), rel=1e-5)


def test_the_gradient_of_the_focal_loss_is_finite_where_the_answer_is_sure():
    for gamma in (0.5, 1.0, 2.0):
        task = build(focal_gamma=gamma)
        logits = np.float32([[30, 0, 0], [200, 0, 0]])
        found = jax.grad(lambda x, task=task: task._losses(x, np.eye(3)[[0, 0]]).sum())(logits)
        np.testing.assert_allclose(found, 0, atol=1e-5)


def test_class_weights_are_not_negative_and_not_all_zero():
    build(class_weights=(0.0, 1.0, 2.0))
    for wrong in ((-1.0, 1.0, 1.0), (0.0, 0.0, 0.0)):
        with pytest.raises(UserError, match="write numbers of 0 or more, not all of them 0"):
            build(class_weights=wrong)


def test_a_fraction_is_no_class():
    image = ArraySpec((8, 8, 1), np.dtype(np.uint8))
    spec = {"image": image, "label": ArraySpec((), np.dtype(np.float32))}
    with pytest.raises(UserError, match=r"does not fit task classification: it wants .*int32 \[\]"):
        tasks.build({"name": "classification"}, MODEL, DataInfo(spec, 3))


def test_logits_are_adjusted_by_the_log_of_the_frequencies_in_training_alone():
    task = build(logit_adjustment=0.5, counts=(6, 3, 1))
    shifted = LOGITS + 0.5 * np.log([0.6, 0.3, 0.1])
    expected = -jax.nn.log_softmax(shifted)[np.arange(3), np.array([2, 1, 0])].sum()
    assert loss_of(task, [2, 1, 0])[0] == pytest.approx(float(expected), rel=1e-5)
    plain = answering(build(), LOGITS).predict({}, batch_of([0, 0, 0]))["probability"]
    np.testing.assert_array_equal(
        answering(task, LOGITS).predict({}, batch_of([0, 0, 0]))["probability"], plain
    )
    with pytest.raises(UserError, match=r"logit_adjustment=1.0: this source does not count"):
        build(logit_adjustment=1.0)


def test_examples_may_have_weights():
    weight = np.array([2.0, 0.0, 1.0], np.float32)
    total, count = loss_of(build(), [0, 1, 2], weight=weight)
    parts = [loss_of(build(), [0, 1, 2], weight=np.eye(3, dtype=np.float32)[i])[0] for i in (0, 2)]
    assert total == pytest.approx(float(2 * parts[0] + parts[1]), rel=1e-5)
    assert count == 3
    batch = {"image": np.zeros((3, 8, 8, 1), np.uint8), "label": np.arange(3), "weight": weight}
    mixed = build(mixup=0.5).augment(batch, jax.random.key(0))
    assert mixed["weight"].shape == (3,)


def test_images_with_several_labels_have_metrics_of_their_own():
    labels = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0]], np.float32)
    task = answering(build("multilabel", label=(3,)), LOGITS)
    batch = batch_of(labels)
    found = task.metrics(jax.device_get({**task.eval_sums({}, batch), **task.eval_rows({}, batch)}))
    yes = LOGITS >= 0
    precision = [sklearn.average_precision_score(labels[:, i], LOGITS[:, i]) for i in (0, 1)]
    assert found["mean_ap"] == pytest.approx(np.mean(precision))
    assert [found[f"ap/{i}"] for i in (0, 1)] == pytest.approx(precision)
    assert "ap/2" not in found
    alike = dataclasses.replace(task, info=task.info._replace(class_names=("a", "a", "b")))
    sums = {"labels": labels, "score": LOGITS, "examples": 3, "loss": 0.0}
    assert {name for name in alike.metrics(sums) if "/" in name} == {"ap/a (0)", "ap/a (1)"}
    assert found["f1_micro"] == pytest.approx(sklearn.f1_score(labels.ravel(), yes.ravel()))
    loss = np.log1p(np.exp(LOGITS)) - labels * LOGITS
    assert found["loss"] == pytest.approx(loss.sum() / 3, rel=1e-5)
    sums = {"labels": labels, "score": np.full((3, 3), 0.6), "examples": 3, "loss": 0.0}
    each = build("multilabel", label=(3,), threshold=(0.5, 0.7, 0.7)).metrics(sums)
    answers = np.tile([1, 0, 0], 3)
    assert each["f1_micro"] == pytest.approx(sklearn.f1_score(labels.ravel(), answers))
    assert task.headline == "mean_ap"
    assert tasks.metric_info("multilabel")["ap/*"].higher_is_better


def test_rows_that_only_fill_a_batch_of_several_labels_do_not_count():
    labels = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0]], np.float32)
    task = answering(build("multilabel", label=(3,)), LOGITS)
    sums = jax.device_get(task.eval_sums({}, batch_of(labels) | {"mask": np.array([1.0, 0, 1])}))
    losses = (np.log1p(np.exp(LOGITS)) - labels * LOGITS).sum(-1)
    assert sums["examples"] == 2
    assert sums["loss"] == pytest.approx(losses[0] + losses[2], rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "label", "message"),
    [
        ({}, (), "the data has one label an image; write config.task.name='classification'"),
        ({"loss": "softmax"}, (3,), "loss='softmax': task multilabel has sigmoid"),
        ({"threshold": 2.0}, (3,), "threshold=2.0"),
        ({"threshold": (0.5, 2.0, 0.5)}, (3,), "threshold=2.0"),
        ({"threshold": (0.5, 0.5)}, (3,), "threshold has 2 numbers; write one, or one for each"),
    ],
)
def test_what_several_labels_cannot_be(fields, label, message):
    with pytest.raises(UserError, match=message):
        build("multilabel", label=label, **fields)


def test_outputs_that_are_not_finite_are_never_right():
    broken = np.array([[np.nan, 1.0], [np.inf, 0.0], [0.0, 1.0]], np.float32)
    assert top_classes(jnp.asarray(broken), 2).tolist() == [[-1, -1], [-1, -1], [1, 0]]
    labels = np.array([[1], [1], [0], [0]])
    assert average_precision(labels, np.full((4, 1), np.nan)) == 0
    assert average_precision(labels, np.array([[0.9], [0.8], [np.nan], [0.1]])) == pytest.approx(
        (1 / 2 + 2 / 3) / 2  # The broken one is a wrong answer above both.
    )
    task = answering(build(), np.full((3, 3), np.nan, np.float32))
    batch = {"image": np.zeros((3, 8, 8, 1)), "label": np.arange(3), "mask": np.ones(3)}
    found = task.metrics(jax.device_get(task.eval_sums({}, batch)))
    assert [found[name] for name in ("accuracy", "balanced_accuracy", "f1")] == [0, 0, 0]
    assert np.isnan([found["loss"], found["ece"]]).all()
