"""Detection: matching against scipy, losses by hand, padded frames, mosaics, and what is drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from vit_jax import models, tasks
from vit_jax.augment.spec import Augmentation
from vit_jax.errors import UserError
from vit_jax.tasks import _matching

TINY = {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 8}
FIELDS = ("image", "boxes", "box_label", "box_crowd")


@pytest.fixture
def build(scene_info):
    def make(model=None, names=FIELDS, num_classes=10, **fields):
        model = {**TINY, **(model or {})}
        return tasks.build({"name": "detection", **fields}, model, scene_info(num_classes, *names))

    return make


class Constant:
    """A model that answers with given scores and boxes."""

    def __init__(self, scores, boxes):
        self.answer = jnp.asarray(scores), jnp.asarray(boxes)

    def apply(self, *_, **__):
        return self.answer


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_matching_costs_no_more_than_scipys(seed):
    rng = np.random.default_rng(seed)
    costs = rng.normal(size=(3, 9, 5)).astype(np.float32)
    real = rng.uniform(size=(3, 5)) < 0.7
    matched = np.asarray(jax.jit(_matching.assign)(costs, real))
    for cost, one, kept in zip(costs, matched, real, strict=True):
        assert len(set(one)) == 5
        rows, columns = linear_sum_assignment(cost[:, kept])
        best = cost[:, kept][rows, columns].sum()
        assert cost[one[kept], np.flatnonzero(kept)].sum() == pytest.approx(best, abs=1e-5)


def test_matching_ends_where_costs_are_not_numbers():
    costs = np.full((1, 6, 4), np.nan, np.float32)
    matched = jax.jit(_matching.assign)(costs, np.ones((1, 4), bool))
    assert len(set(np.asarray(matched)[0])) == 4


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1.0),
        ((0, 0, 0.5, 1), (0.5, 0, 1, 1), 0.0),
        ((0, 0, 0.25, 1), (0.75, 0, 1, 1), -0.5),
        ((0, 0, 1, 1), (0.25, 0.25, 0.75, 0.75), 0.25),
        ((0.5, 0.5, 0.5, 0.5), (0, 0, 1, 1), 0.0),
    ],
)
def test_generalized_iou_by_hand(a, b, value):
    a, b = jnp.array(a, jnp.float32), jnp.array(b, jnp.float32)
    np.testing.assert_allclose(_matching.generalized_iou(a, b), value, atol=1e-5)
    assert np.isfinite(jax.grad(_matching.generalized_iou)(a, b)).all()


def perfect_answer(batch, loss, num_proposals=16, classes=10):
    """Scores and boxes that are right about the first proposals and nothing else."""
    room = batch["boxes"].shape[1]
    boxes = np.zeros((8, num_proposals, 4), np.float32)
    boxes[:, :room] = batch["boxes"]
    scores = np.full((8, num_proposals, classes + (loss == "softmax")), -20, np.float32)
    rows, places = np.nonzero(batch["box_label"] >= 0)
    if loss == "softmax":
        scores[..., -1] = 20
        scores[rows, places, -1] = -20
    scores[rows, places, batch["box_label"][rows, places]] = 20
    return scores, boxes


@pytest.mark.parametrize("loss", ["focal", "softmax"])
def test_a_perfect_answer_costs_nothing_and_scores_all(build, scene_batch, loss):
    task = build(loss=loss)
    task = dataclasses.replace(task, model=Constant(*perfect_answer(scene_batch, loss)))
    batch = task.augment(scene_batch, jax.random.key(0))
    total, count = jax.jit(task.loss_fn)({}, batch, jax.random.key(0))
    assert count == (scene_batch["box_label"] >= 0).sum()
    assert total / count < 1e-4
    rows = task.eval_rows({}, scene_batch)
    found = task.metrics({**jax.device_get(rows), "examples": 8})
    assert found["AP"] == found["AP50"] == found["AR"] == pytest.approx(1)
    assert found["num_examples"] == 8
    absent = set(map(str, range(10))) - {f"{n}" for n in scene_batch["box_label"].ravel()}
    assert not {f"AP/{name}" for name in absent} & found.keys()


@pytest.mark.parametrize("num_objects", [3, 0])
def test_the_softmax_loss_is_detrs_weighted_mean(build, scene_batch, num_objects):
    """Over all proposals of the batch, by class weight; places are a mean over the objects."""
    labels = np.full_like(scene_batch["box_label"], -1)
    labels[0, :num_objects] = 7
    _, boxes = perfect_answer(scene_batch, "softmax")
    scores = np.random.default_rng(0).normal(size=(*boxes.shape[:2], 11)).astype(np.float32)
    task = build(loss="softmax", l1_weight=0.0, giou_weight=0.0, class_weight=1.5)
    task = dataclasses.replace(task, model=Constant(scores, boxes))
    batch = task.augment({**scene_batch, "box_label": labels}, jax.random.key(0))
    total, count = task.loss_fn({}, batch, jax.random.key(0))
    assert count == num_objects
    log_p = np.array(jax.nn.log_softmax(scores))
    target = np.full(scores.shape[:2], 10)
    cost = -np.exp(log_p[0][:, labels[0, :num_objects]])
    target[0, linear_sum_assignment(cost)[0]] = 7
    weights = np.where(target == 10, 0.1, 1.0)
    losses = -np.take_along_axis(log_p, target[..., None], -1)[..., 0]
    expected = 1.5 * (weights * losses).sum() / weights.sum()
    np.testing.assert_allclose(total / max(count, 1), expected, rtol=1e-5)


def test_a_displaced_box_costs_its_distance(build, scene_batch):
    scores, boxes = perfect_answer(scene_batch, "focal")
    task = dataclasses.replace(build(), model=Constant(scores, boxes + 0.03))
    batch = task.augment(scene_batch, jax.random.key(0))
    total, count = task.loss_fn({}, batch, jax.random.key(0))
    real = scene_batch["box_label"] >= 0
    giou = _matching.generalized_iou(scene_batch["boxes"][real] + 0.03, scene_batch["boxes"][real])
    expected = 5.0 * 2 * 0.03 * count + 2.0 * (1 - giou).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_of_two_boxes_that_are_equally_far_the_one_that_overlaps_is_matched(build):
    """One is beside the object, the other one around it; both differ by 0.3 in total."""
    beside, around = (0.7, 0.4, 0.9, 0.6), (0.325, 0.325, 0.675, 0.675)
    boxes = np.array([[beside, around], [around, beside]], np.float32)
    task = build(names=("image", "boxes", "box_label"), class_weight=0.0)
    task = dataclasses.replace(task, model=Constant(np.zeros((2, 2, 10), np.float32), boxes))
    truth = np.array([[[0.4, 0.4, 0.6, 0.6]]] * 2, np.float32)
    batch = {"image": np.zeros((2, 8, 8, 3)), "boxes": truth, "box_label": np.array([[3]] * 2)}
    total, count = jax.jit(task.loss_fn)({}, batch, jax.random.key(0))
    assert count == 2
    assert total / 2 == pytest.approx(5 * 0.3 + 2 * (1 - 0.04 / 0.1225), rel=1e-4)


def test_crowds_and_areas_of_the_data_are_what_is_evaluated(build, scene_batch):
    task = dataclasses.replace(build(), model=Constant(*perfect_answer(scene_batch, "focal")))
    rng = np.random.default_rng(0)
    shape = scene_batch["box_label"].shape
    given = {
        "box_crowd": rng.random(shape) < 0.5,
        "box_area": rng.random(shape).astype(np.float32),
        "image_size": rng.integers(100, 200, (8, 2)).astype(np.int32),
    }
    rows = jax.device_get(task.eval_rows({}, {**scene_batch, **given}))
    for name, values in given.items():
        np.testing.assert_array_equal(rows[name], values)


def test_mosaics_and_erasing_draw_from_keys_of_their_own(build, scene_batch, monkeypatch):
    task, drawn = build({"patch_size": 4}, mosaic=0.5), []
    bernoulli, augment = jax.random.bernoulli, Augmentation.__call__

    def coin(key, *args):
        drawn.append(np.asarray(jax.random.key_data(key)))
        return bernoulli(key, *args)

    def rest(self, key, *args):
        drawn.append(np.asarray(jax.random.key_data(key)))
        return augment(self, key, *args)

    monkeypatch.setattr(jax.random, "bernoulli", coin)
    monkeypatch.setattr(Augmentation, "__call__", rest)
    task.augment(scene_batch, jax.random.key(0))
    assert len(drawn) == 2
    assert (drawn[0] != drawn[1]).any()


def test_crowds_are_not_learned_and_images_without_objects_have_no_terms(build, scene_batch):
    crowded = {**scene_batch, "box_crowd": np.ones_like(scene_batch["box_crowd"])}
    task = dataclasses.replace(build(), model=Constant(*perfect_answer(scene_batch, "focal")))
    _, count = task.loss_fn({}, task.augment(crowded, jax.random.key(0)), jax.random.key(0))
    assert count == 0


@pytest.mark.parametrize("loss", ["focal", "softmax"])
def test_objects_cropped_to_nothing_cost_something_finite(build, scene_batch, loss):
    """An object may be left without area, at the border or in a corner."""
    task = build(loss=loss)
    scores, boxes = perfect_answer(scene_batch, loss)
    objects = scene_batch["boxes"].copy()
    objects[0, :, 2] = objects[0, :, 0]
    objects[1], objects[2] = 0.0, 1.0
    batch = task.augment({**scene_batch, "boxes": objects}, jax.random.key(0))

    def mean_loss(scores, boxes):
        found = dataclasses.replace(task, model=Constant(scores, boxes))
        total, count = found.loss_fn({}, batch, jax.random.key(0))
        return total / count

    value, grads = jax.value_and_grad(mean_loss, (0, 1))(jnp.asarray(scores), jnp.asarray(boxes))
    assert 0 < value < 20
    assert all(np.isfinite(grad).all() for grad in grads)


def test_padded_frames_answer_in_the_unpadded_image(build, scene_batch):
    """Half of the frame's height is image: the model works in the frame, people in the image."""
    content = np.tile(np.array([0.5, 1.0], np.float32), (8, 1))
    scores, boxes = perfect_answer(scene_batch, "focal")
    task = dataclasses.replace(build(), model=Constant(scores, boxes * [0.5, 1, 0.5, 1]))
    padded = {**scene_batch, "content": content}
    total, count = task.loss_fn({}, task.augment(padded, jax.random.key(0)), jax.random.key(0))
    assert total / count < 1e-4
    found = task.metrics({**jax.device_get(task.eval_rows({}, padded)), "examples": 8})
    assert found["AP"] == pytest.approx(1)


def test_mosaics_keep_boxes_on_their_objects(scene_batch):
    objects = {name: jnp.asarray(scene_batch[name]) for name in ("boxes", "box_label")}
    marks = jnp.asarray(scene_batch["segmentation"], jnp.float32)
    images, moved = _matching.mosaic((marks > 0).astype(jnp.float32), objects)
    assert images.shape == (8, 32, 32, 1)
    assert moved["boxes"].shape == (8, 20, 4)
    for image, boxes, labels in zip(images[..., 0], *moved.values(), strict=True):
        covered = np.zeros((32, 32), bool)
        for box in np.asarray(boxes)[np.asarray(labels) >= 0] * 32:
            low, high = np.floor(box[:2] + 1e-4).astype(int), np.ceil(box[2:] - 1e-4).astype(int)
            covered[low[0] : high[0], low[1] : high[1]] = True
            assert image[low[0] : high[0], low[1] : high[1]].any()
        outside = np.asarray(image)[~covered]
        # The last scene has pixels of digits whose boxes the fixture leaves out.
        assert outside.sum() <= np.asarray(marks[7] > 0).sum() / 4 + 1e-3


def test_a_mosaic_batch_has_every_object_four_times(build, scene_batch):
    task = build({"patch_size": 4}, mosaic=1.0)
    batch = task.augment(scene_batch, jax.random.key(0))
    objects = (scene_batch["box_label"] >= 0).sum()
    assert (batch["box_label"] >= 0).sum() == 4 * objects
    never = build({"patch_size": 4}, mosaic=1e-9).augment(scene_batch, jax.random.key(0))
    assert (never["box_label"] >= 0).sum() == objects
    assert never["boxes"].shape == batch["boxes"].shape


def test_what_is_said_and_drawn(build, scene_batch):
    task = dataclasses.replace(build(), model=Constant(*perfect_answer(scene_batch, "focal")))
    examples = {**scene_batch, **jax.device_get(task.predict({}, scene_batch))}
    digit = str(scene_batch["box_label"][0, 0])
    assert any(digit in line for line in task.result_lines(examples, 5)[0])
    captions = task.summaries(examples)
    assert f"{digit} 100%" in captions[0]
    assert captions[7] == "nothing"
    assert task.pictures(examples)[0].shape == (192, 192, 3)
    (section,) = task.sections(examples)
    assert section.title == "Detections beside the truth"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "per_tokn"}, "did you mean 'per_token'"),
        (
            {"pyramid": [3.0]},
            r"pyramid=\[3.0\]: write a list of different powers of two, 0.125 to 8",
        ),
        ({"head": "tokens", "pyramid": [1.0]}, "read one map; write head='per_token'"),
        ({"loss": "hinge"}, "loss='hinge': write focal or softmax"),
        ({"head": "tokens", "num_queries": 4}, "makes 4 proposals, but images have room for 5"),
        ({"names": ("image",)}, r"it wants.*boxes.*gives \{'image'"),
        ({"num_classes": 0}, "needs the classes of the objects"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(build, fields, message):
    with pytest.raises(UserError, match=message):
        build(**fields)


def test_an_unknown_activation_of_the_head_is_named_when_the_model_is_built():
    backbone = models.build("vit_ti16")
    with pytest.raises(UserError, match="activation='rellu' is not known; did you mean 'relu'"):
        models.Detector(backbone, 3, activation="rellu")
