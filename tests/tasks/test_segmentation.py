"""Segmentation: losses and metrics against counts in NumPy, windows, and what the report draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax import tasks
from vit_jax.errors import UserError
from vit_jax.models.heads.dense import _around_cells
from vit_jax.report import drawing
from vit_jax.tasks._sliding import over_scales, slide
from vit_jax.types import ArraySpec, DataInfo

TINY = {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4}


def info(num_classes=3, side=8, segmentation=None):
    spec = {
        "image": ArraySpec((side, side, 3), np.dtype(np.uint8)),
        "segmentation": ArraySpec(segmentation or (side, side, 1), np.dtype(np.uint8)),
    }
    return DataInfo(spec, num_classes)


def build(data=None, model=TINY, **fields):
    return tasks.build({"name": "segmentation", **fields}, model, data or info())


class Constant:
    """A model that answers with given logits."""

    def __init__(self, logits):
        self.logits = jnp.asarray(logits)

    def apply(self, _, images, **__):
        return self.logits


def that_predicts(task, logits):
    return dataclasses.replace(task, model=Constant(logits))


def random_case(seed, batch=4, side=8, classes=3):
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(classes), 255], (batch, side, side, 1)).astype(np.uint8)
    logits = rng.normal(size=(batch, side, side, classes)).astype(np.float32)
    arrays = {"image": np.zeros((batch, side, side, 3), np.uint8), "segmentation": labels}
    return logits, arrays | {"mask": np.array([1, 1, 0, 1][:batch], np.float32)}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_metrics_are_those_of_a_plain_count(seed):
    logits, batch = random_case(seed)
    found = build().metrics(jax.device_get(that_predicts(build(), logits).eval_sums({}, batch)))
    real = batch["mask"] > 0
    truth, said = batch["segmentation"][real][..., 0], logits[real].argmax(-1)
    known = truth != 255
    ious = []
    for number in range(3):
        both = (known & (truth == number) & (said == number)).sum()
        either = (known & ((truth == number) | (said == number))).sum()
        ious.append(both / either)
        assert found[f"iou/{number}"] == pytest.approx(ious[-1], abs=1e-12)
    assert found["miou"] == pytest.approx(np.mean(ious), abs=1e-12)
    assert found["pixel_accuracy"] == pytest.approx((truth == said)[known].mean(), abs=1e-12)
    assert found["num_examples"] == 3


def test_counts_beyond_32_bits_are_exact():
    """Of 90,000 pixels 80,000 are right: in one image, and in as many as their sums can count."""
    labels = np.zeros((1, 300, 300, 1), np.uint8)
    logits = np.zeros((1, 300, 300, 3), np.float32)
    logits[..., 0] = 1
    logits[:, :100, :100, 1] = 2
    batch = {"image": labels, "segmentation": labels, "mask": np.ones(1)}
    sums = jax.device_get(that_predicts(build(), logits).eval_sums({}, batch))
    for batches in (1, 60_000, 400_000):
        many = {name: x * np.int32(batches) for name, x in sums.items()}
        assert all(x.dtype == np.int32 for x in many.values())
        found = build().metrics(many)
        assert found["pixel_accuracy"] == found["iou/0"] == 80_000 / 90_000
        assert found["miou"] == 80_000 / 90_000 / 2
        assert found["num_examples"] == batches
    assert 60_000 * 80_000 > 2**32


def test_classes_of_one_name_have_metrics_of_their_own():
    task = build(info()._replace(class_names=("a", "a", "b")))
    sums = {"confusion_low": np.eye(3, dtype=np.int32).ravel(), "invalid": 0, "examples": 1}
    found = task.metrics({**sums, "confusion_high": np.zeros(9, np.int32)})
    assert {name for name in found if "/" in name} == {"iou/a (0)", "iou/a (1)", "iou/b"}


def test_classes_that_never_occur_do_not_count():
    labels = np.zeros((1, 8, 8, 1), np.uint8)
    logits = np.zeros((1, 8, 8, 3), np.float32)
    logits[..., 0] = 1
    batch = {"image": labels, "segmentation": labels, "mask": np.ones(1)}
    found = build().metrics(jax.device_get(that_predicts(build(), logits).eval_sums({}, batch)))
    assert found["miou"] == 1.0
    assert "iou/1" not in found


def test_a_class_that_is_only_predicted_counts_as_wrong():
    labels = np.zeros((1, 8, 8, 1), np.uint8)
    logits = np.zeros((1, 8, 8, 3), np.float32)
    logits[:, :4, :, 1] = 1
    batch = {"image": labels, "segmentation": labels, "mask": np.ones(1)}
    found = build().metrics(jax.device_get(that_predicts(build(), logits).eval_sums({}, batch)))
    assert found["miou"] == (0.5 + 0.0) / 2
    assert (found["iou/0"], found["iou/1"]) == (0.5, 0.0)
    assert "iou/2" not in found


def test_labels_out_of_range_are_an_error():
    logits, batch = random_case(0)
    batch["segmentation"][0, 0, 0] = 7
    sums = jax.device_get(that_predicts(build(), logits).eval_sums({}, batch))
    with pytest.raises(UserError, match=r"1 images have labels.*check_segmentation\(3\)"):
        build().metrics(sums)


@pytest.mark.parametrize("dice", [0.0, 0.7])
def test_loss_is_summed_over_labelled_pixels(dice):
    logits, batch = random_case(3)
    task = that_predicts(build(dice=dice), logits)
    labels = batch["segmentation"][..., 0].astype(np.int64)
    perturbed = task.augment(batch, jax.random.key(0))
    loss, count = task.loss_fn({}, perturbed, jax.random.key(0))
    known = labels != 255
    log_p = np.asarray(jax.nn.log_softmax(logits))
    clipped = np.where(known, labels, 0)
    losses = -np.take_along_axis(log_p, clipped[..., None], -1)[..., 0]
    expected = losses[known].sum()
    for row in range(len(labels)):
        overlaps = []
        for number in np.unique(labels[row][known[row]]):
            truth, said = labels[row] == number, np.exp(log_p[row, ..., number]) * known[row]
            overlaps.append(1 - 2 * said[truth].sum() / (truth.sum() + said.sum()))
        expected += dice * known[row].sum() * np.mean(overlaps)
    assert count == known.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_batch_without_labels_has_no_loss():
    logits, batch = random_case(3)
    batch["segmentation"][:] = 255
    task = that_predicts(build(dice=1.0), logits)
    loss, count = task.loss_fn({}, task.augment(batch, jax.random.key(0)), jax.random.key(0))
    assert (loss, count) == (0, 0)


def test_pixels_are_shown_with_half_a_cell_around_them():
    images = np.random.default_rng(0).normal(size=(1, 6, 10, 1)).astype(np.float32)
    shown = np.asarray(_around_cells(jnp.asarray(images), (3, 5)))
    padded = np.pad(images[0, ..., 0], 1, mode="edge")
    for row in range(3):
        for column in range(5):
            around = padded[2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
            assert sorted(shown[0, row, column]) == sorted(around.ravel())


def test_pixels_beyond_the_last_patch_have_their_neighbours_answer():
    """14 pixels, patches of 4: each cell's answer stays where the cell is."""
    task = build(info(side=14), crop_to_patches=True)
    size, grid = (14, 14), (3, 3)
    cells = jnp.arange(9.0).reshape(1, 3, 3, 1).repeat(3, -1)
    logits = task.model._over_pixels(cells, size, grid)
    assert logits.shape == (1, 14, 14, 3)
    centres = logits[0, 1:12:4, 1:12:4, 0] + logits[0, 2:12:4, 2:12:4, 0]
    np.testing.assert_allclose(centres / 2, cells[0, ..., 0], atol=0.26)
    np.testing.assert_array_equal(logits[0, 12:, :12], jnp.stack([logits[0, 11, :12]] * 2))


def test_pixels_need_cells_of_one_size():
    task = build(info(side=11), head="pixels", crop_to_patches=True)
    with pytest.raises(UserError, match=r"divide, not \[11, 11\] pixels in \[2, 2\] cells"):
        tasks.abstract_params(task)


def test_pooled_levels_need_grids_that_divide():
    task = build(info(side=12), pyramid=(1.0, 0.5))
    with pytest.raises(UserError, match=r"scale of 0.5 needs .* that 2 divides, not 3x3 tokens"):
        tasks.abstract_params(task)


@pytest.mark.parametrize("size", [(12, 20), (8, 8), (5, 9)])
@pytest.mark.parametrize("stride", [(8, 8), (3, 5)])
def test_windows_cover_every_pixel_once_on_average(size, stride):
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))
    seen = []

    def predict(window):
        seen.append(window.shape)
        return 2 * window

    np.testing.assert_allclose(slide(predict, images, (8, 8), stride), 2 * images, rtol=1e-6)
    assert set(seen) == {(2, 8, 8, 3)}


def test_scales_and_mirrors_are_averaged_as_probabilities():
    images = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    found = over_scales(lambda x: x, images, (1.0,), mirror=True)
    np.testing.assert_allclose(found, jax.nn.softmax(images), rtol=1e-5)

    def place(x):  # Says where a pixel is, so that a mirror that is not undone shows.
        ramp = jnp.linspace(0, 1, x.shape[2])[None, None, :, None]
        side = jnp.where(x[:, :1, :1, :1] > x[:, :1, -1:, :1], ramp[:, :, ::-1], ramp)
        return jnp.broadcast_to(jnp.concatenate([side, -side], -1), (*x.shape[:3], 2))

    ramp = jnp.linspace(-1, 1, 8).reshape(1, 1, 8, 1) * jnp.ones((1, 8, 1, 1))
    found = over_scales(place, ramp, (1.0,), mirror=True)
    assert (np.diff(found[0, 0, :, 0]) > 0).all()
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)


def test_each_scale_is_predicted_at_its_own_size_with_its_mirror():
    sizes = []

    def predict(images):
        sizes.append(images.shape[1:3])
        return jnp.zeros((*images.shape[:3], 4)) + jnp.arange(4.0)[None, None, None]

    found = over_scales(predict, jnp.zeros((1, 8, 12, 3)), (1.0, 0.5), mirror=True)
    assert sizes == [(8, 12), (8, 12), (4, 6), (4, 6)]
    expected = np.exp(np.arange(4)) / np.exp(np.arange(4)).sum()
    np.testing.assert_allclose(found, np.broadcast_to(expected, (1, 8, 12, 4)), rtol=1e-5)


def test_evaluation_slides_over_larger_images():
    task = build(stride=4, scales=(1.0, 0.5), mirror=True)
    batch = {"image": np.zeros((2, 12, 16, 3), np.uint8)}
    shapes = jax.eval_shape(lambda p: task.predict(p, batch), tasks.abstract_params(task))
    assert shapes["predicted"].shape == (2, 12, 16)


def test_pictures_lines_and_sections():
    task = build(class_names=("sky", "sea", "land"))
    predicted = np.zeros((2, 8, 8), np.uint8)
    predicted[1, :4] = 2
    examples = {
        "image": np.full((2, 8, 8, 3), 9, np.uint8),
        "segmentation": np.full((2, 8, 8, 1), 255, np.uint8),
        "predicted": predicted,
    }
    assert task.result_lines(examples, 2) == [["100.0% sky"], ["50.0% sky", "50.0% land"]]
    assert task.summaries(examples)[1] == "50.0% sky, 50.0% land"
    first, second = task.pictures(examples)
    assert (first == 9).all()
    tint = np.round(9 + 0.55 * (np.array(drawing.class_color(2)) - 9))
    assert (second[:4, -1] == tint).all()  # The upper half, enlarged; the name is on its left.
    assert (second[len(second) // 2 :] == 9).all()
    (section,) = task.sections(examples)
    assert section.title == "Segmentations beside the truth"
    assert section.image is not None


@pytest.mark.parametrize(
    ("fields", "data", "message"),
    [
        ({"head": "mas"}, None, r"config.task.head='mas' is not known; did you mean 'mask'"),
        ({"pyramid": 2.0}, None, "pyramid=2.0: write a list"),
        ({"pyramid": (2.0, 2.0)}, None, "write a list of different powers"),
        ({"head": "mask", "subcells": 2}, None, "subcells=2 is for head='linear'"),
        ({}, info(0), "num_classes=0: write the number of classes"),
        ({"class_names": ("a",)}, None, "1 names for 3 classes"),
        ({}, info(segmentation=(4, 4, 1)), r"it wants.*segmentation.*gives.*\[4, 4, 1\]"),
        ({}, info(side=10), "crop_to_patches"),
        ({"stride": 9}, None, "stride=9: windows of 8x8 pixels would leave some out"),
        ({"stride": -4}, None, "stride=-4: write 0 or more"),
        ({"stride": (4, 0)}, None, r"stride=\(4, 0\): windows"),
        ({"stride": (4, 4, 4)}, None, "one number or .down, right"),
        ({"scales": ()}, None, r"scales=\[\]: write one factor or more"),
        ({"scales": (1.0, -1.0)}, None, "write one factor or more"),
        (
            {"scales": (1.0, 0.5)},
            None,
            r"scales=\[1.0, 0.5\]: .*table.*config.task.stride",
        ),
        ({"dice": -1.0}, None, "config.task.dice=-1.0: write 0 or more"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(fields, data, message):
    with pytest.raises(UserError, match=message):
        build(data, **fields)


def test_dropped_patches_leave_nothing_to_segment():
    task = build(model={**TINY, "patch_drop": 0.5, "pooling": "mean"})
    batch = task.augment(random_case(0)[1], jax.random.key(0))
    params = tasks.abstract_params(task)
    with pytest.raises(UserError, match="patch_drop=0"):
        jax.eval_shape(lambda params: task.loss_fn(params, batch, jax.random.key(0)), params)
