"""AP is pycocotools' number for random and adversarial detections."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vit_jax.tasks._average_precision import curves

SIZE = np.array([200, 160])


def case(seed, *, images=6, classes=3, objects=6, detections=14, crowds=0.2, ties=False):
    """Random truth, and detections of which half are near an object."""
    rng = np.random.default_rng(seed)

    def boxes(count):
        start = rng.uniform(0, 0.7, (images, count, 2))
        return np.concatenate([start, start + rng.uniform(0.02, 0.6, start.shape)], -1)

    truth, found = boxes(objects), boxes(detections)
    near = rng.integers(0, max(objects, 1), (images, detections // 2))
    if objects:
        close = np.take_along_axis(truth, near[..., None], 1)
        found[:, : detections // 2] = close + rng.normal(0, 0.02, close.shape)
        found[..., 2:] = np.maximum(found[..., 2:], found[..., :2] + 0.01)
    label = rng.integers(-1, classes, (images, objects))
    detected = rng.integers(-1, classes, (images, detections))
    if objects:
        detected[:, : detections // 2] = np.take_along_axis(label, near, 1)
    score = rng.uniform(size=(images, detections))
    return {
        "boxes": truth.astype(np.float32),
        "box_label": label,
        "box_crowd": rng.uniform(size=label.shape) < crowds,
        "box_area": np.where(
            rng.uniform(size=label.shape) < 0.5, rng.uniform(1, 2e4, label.shape), 0
        ),
        "detected_boxes": found.astype(np.float32),
        "detected_label": detected,
        "detected_score": score.round(1) if ties else score,
        "image_size": np.tile(SIZE, (images, 1)),
    }


def xywh(box):
    y0, x0, y1, x1 = box.astype(np.float64) * np.tile(SIZE, 2)
    return [x0, y0, x1 - x0, y1 - y0]


def reference(found, classes, max_detections=100):
    """`COCOeval`'s precision `[T, classes, areas]` (mean over recalls) and recall."""
    truth, detected = [], []
    images = range(len(found["image_size"]))
    for image in images:
        for i in np.flatnonzero(found["box_label"][image] >= 0):
            box = xywh(found["boxes"][image, i])
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image,
                    "category_id": int(found["box_label"][image, i]),
                    "bbox": box,
                    "area": float(found["box_area"][image, i]) or box[2] * box[3],
                    "iscrowd": int(found["box_crowd"][image, i]),
                }
            )
        for i in np.flatnonzero(found["detected_label"][image] >= 0):
            detected.append(
                {
                    "image_id": image,
                    "category_id": int(found["detected_label"][image, i]),
                    "bbox": xywh(found["detected_boxes"][image, i]),
                    "score": float(found["detected_score"][image, i]),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in images],
            "categories": [{"id": i, "name": str(i)} for i in range(classes)],
            "annotations": truth,
            "info": {},
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(detected), "bbox")
        judge.params.maxDets = [max_detections]
        judge.evaluate()
        judge.accumulate()
    precision, recall = judge.eval["precision"][..., 0], judge.eval["recall"][..., 0]
    precision = np.where(precision[:, 0] < 0, np.nan, precision.mean(1))
    return precision, np.where(recall < 0, np.nan, recall)


def agree(found, classes=3, max_detections=100):
    ours = curves(found, classes, max_detections)
    theirs = reference(found, classes, max_detections)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-12)
    return ours


@settings(max_examples=15, deadline=None)
@example(seed=0, ties=True, crowds=1.0)
@given(seed=st.integers(0, 10**6), ties=st.booleans(), crowds=st.sampled_from([0.0, 0.3]))
def test_random_detections(seed, ties, crowds):
    agree(case(seed, ties=ties, crowds=crowds))


@pytest.mark.parametrize(
    "fields",
    [
        {"objects": 40, "detections": 160, "classes": 1, "images": 2},
        {"objects": 1, "crowds": 1.0},
        {"images": 1, "objects": 3, "detections": 2},
    ],
    ids=["more than 100 detections", "only crowds", "fewer detections than objects"],
)
def test_adversarial_inputs(fields):
    agree(case(1, **fields), fields.get("classes", 3))


def test_a_detection_of_the_greatest_area_of_a_size_is_still_of_that_size():
    """32 by 32 pixels, where nothing is: it counts against small and medium objects."""
    found = case(0, images=1, classes=1, objects=2, detections=3, crowds=0)
    found["box_label"][:], found["detected_label"][:] = 0, 0
    found["box_area"][:] = 1000.0, 1100.0
    found["image_size"][:] = 256, 128
    found["boxes"][0] = [[0, 0, 0.125, 0.24], [0.5, 0.5, 0.625, 0.76]]
    found["detected_boxes"][0] = [[0.75, 0, 0.875, 0.25], *found["boxes"][0]]
    found["detected_score"][0] = 0.9, 0.8, 0.7
    ours = curves(found, 1)
    # Of the two detections that count the first one is wrong.
    np.testing.assert_allclose(ours.precision[0, 0, 1:3], [0.5, 0.5])


def test_few_detections_count_where_few_are_allowed():
    few = agree(case(2, objects=10, detections=40, classes=1), 1, max_detections=5)
    many = agree(case(2, objects=10, detections=40, classes=1), 1)
    assert many.recall[0, 0, 0] > few.recall[0, 0, 0]


def test_no_objects_at_all_leaves_everything_undefined():
    found = case(3)
    found["box_label"][:] = -1
    assert all(np.isnan(part).all() for part in curves(found, 3))


def test_nothing_detected_is_nothing_right():
    found = case(4, crowds=0)
    found["detected_label"][:] = -1
    ours = curves(found, 3)
    assert (ours.precision[:, :, 0] == 0).all()
    assert (ours.recall[:, :, 0] == 0).all()


def test_perfect_detections():
    found = case(5, objects=4, crowds=0)
    found |= {"detected_boxes": found["boxes"], "detected_label": found["box_label"]}
    found["detected_score"] = np.ones(found["box_label"].shape)
    assert (curves(found, 3).precision[:, :, 0] == 1).all()
    agree(found)
