"""The classification task: losses and mixing against recorded values, metrics against a count."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from vit_jax import tasks
from vit_jax.augment import images as _images
from vit_jax.errors import UserError
from vit_jax.report import figures
from vit_jax.tasks.classification import LOSSES
from vit_jax.types import ArraySpec, DataInfo

GOLDEN = Path(__file__).parent.parent / "golden" / "big_vision"
TINY = {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4}


def info(num_classes=5, label=(), image=(8, 8, 1), dtype=np.uint8):
    label_dtype = np.dtype(np.float32 if label else np.int32)
    spec = {"image": ArraySpec(image, np.dtype(dtype)), "label": ArraySpec(label, label_dtype)}
    return DataInfo(spec, num_classes)


def task(data=None, **fields):
    return tasks.build({"name": "classification", **fields}, TINY, data or info())


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("labels", ["onehot", "soft", "multihot"])
def test_losses_and_their_gradients_are_the_recorded_ones(loss, labels):
    golden = np.load(GOLDEN / "losses.npz")
    logits, targets, name = golden["logits"], golden[labels], f"{loss}_xent/{labels}"
    losses = LOSSES[loss](logits, targets)
    gradient = jax.grad(lambda x: LOSSES[loss](x, targets).mean())(jnp.asarray(logits))
    # The reference's stated tolerance: logits reach 75.
    np.testing.assert_allclose(losses, golden[f"{name}/per_example"], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(losses.mean(), golden[f"{name}/mean"], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(gradient, golden[f"{name}/dlogits_of_mean"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", range(3))
def test_mixing_is_the_recorded_one(case):
    golden = np.load(GOLDEN / "mixup.npz")
    images, labels = golden[f"{case}/image"], golden[f"{case}/labels"]
    mixed = _images.mix(golden[f"{case}/a"], images, labels)
    np.testing.assert_allclose(mixed[0], golden[f"{case}/mixed_image"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(mixed[1], golden[f"{case}/mixed_labels"], rtol=1e-6, atol=1e-6)


AMOUNTS = st.tuples(
    st.floats(-1, 1), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(-1, 1), st.floats(-1, 1)
)


@settings(deadline=None, max_examples=25)
@given(AMOUNTS, st.integers(0, 99))
def test_affine_distortion_is_scipys(amounts, seed):
    angle, slant, log_scale, shift_x, shift_y = amounts
    height, width = 7, 10
    image = np.random.default_rng(seed).random((height, width, 2), np.float32)
    rotation = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    matrix = np.array(rotation) @ [[1, 0], [np.tan(slant), 1]] * np.exp(-log_scale)
    centre = np.array([height - 1, width - 1]) / 2
    shift = np.array([shift_y * height, shift_x * width])
    offset = centre - matrix @ (centre + shift)
    moved = _images.affine(jnp.asarray(image), jnp.array(amounts, jnp.float32))
    for channel in range(2):
        plane = affine_transform(
            image[..., channel].astype(np.float64), matrix, offset, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(moved[..., channel], plane, atol=2e-4)


def test_random_affine_stays_within_its_bounds_and_keeps_pixels_uint8():
    rows, columns = np.mgrid[-10:11, -10:11]
    blob = (255 * np.exp(-(rows**2 + columns**2) / 8)).astype(np.uint8)
    images = jnp.broadcast_to(blob[..., None], (200, 21, 21, 1))
    moved = np.asarray(_images.random_affine(jax.random.key(0), images, shift=0.2))
    assert moved.dtype == np.uint8
    density = moved[..., 0] / moved.sum((1, 2, 3), keepdims=True)[..., 0]
    centres = np.stack([(density * rows).sum((1, 2)), (density * columns).sum((1, 2))])
    assert np.abs(centres).max() <= 0.2 * 21 + 0.05
    assert (centres.min(1) < -3).all()
    assert (centres.max(1) > 3).all()


def test_distortion_is_part_of_training_only():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    batch = {"image": jnp.asarray(images), "label": jnp.arange(4)}
    plain, distorted = task(), task(affine={"rotate": 20, "shift": 0.1})
    key = jax.random.key(1)
    seen = distorted.augment(batch, key)["image"]
    assert not np.allclose(seen, plain.augment(batch, key)["image"])
    np.testing.assert_array_equal(seen, distorted.augment(batch, key)["image"])
    np.testing.assert_array_equal(distorted.inputs(batch), plain.inputs(batch))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [({"rotat": 3}, "did you mean 'rotate'"), ({"shear": -1}, "task.affine.shear=-1: write a")],
)
def test_wrong_bounds_of_a_distortion(bounds, message):
    with pytest.raises(UserError, match=message):
        task(affine=bounds)


def test_mixup_coefficient_is_a_reflected_beta():
    keys = jax.random.split(jax.random.key(0), 2000)
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    pair = jnp.concatenate([one, zero])
    share = jax.vmap(lambda key: _images.mixup(key, 0.2, pair)[0][0, 0])(keys)
    assert share.min() >= 0.5
    assert share.max() <= 1.0
    # E[max(b, 1 - b)] for b ~ Beta(0.2, 0.2), by numerical integration: 0.8988.
    np.testing.assert_allclose(share.mean(), 0.8988, atol=0.01)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_cutmix_labels_follow_the_area(seed):
    images = jnp.stack([jnp.zeros((12, 20, 1)), jnp.ones((12, 20, 1))])
    labels = jnp.eye(2)
    mixed, soft = _images.cutmix(jax.random.key(seed), 1.0, images, labels)
    np.testing.assert_allclose(mixed[0].mean(), soft[0, 1], atol=1e-6)
    np.testing.assert_allclose(soft.sum(-1), 1.0, atol=1e-6)


def test_boxes_of_cutmix_have_the_drawn_area_and_lie_anywhere(monkeypatch):
    """A quarter of the image where the border clips nothing; rows do not follow columns."""
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b, shape: jnp.full(shape, 0.75))
    images = jnp.stack([jnp.zeros((16, 16, 1)), jnp.ones((16, 16, 1))])
    cut = jax.jit(jax.vmap(lambda key: _images.cutmix(key, 1.0, images, jnp.eye(2))[0][0, ..., 0]))
    pasted = np.asarray(cut(jax.random.split(jax.random.key(0), 300))) > 0
    assert pasted.mean((1, 2)).max() == 0.25
    assert abs(centers_correlation(pasted)) < 0.2
    assert pasted.any((0, 2)).all()
    assert pasted.any((0, 1)).all()


def centers_correlation(masks):
    """The correlation of the mean row and the mean column of masks."""
    centers = [np.argwhere(mask).mean(0) for mask in masks]
    return np.corrcoef(np.transpose(centers))[0, 1]


def test_mixing_pairs_rows_of_the_whole_batch_on_any_mesh():
    """big_vision pairs within a device's shard, so one row a device is never mixed there."""
    from vit_jax.parallel import sharding

    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    rows = np.arange(8, dtype=np.float32)[:, None]
    placed = jax.device_put(rows, sharding.batch_sharding(mesh))
    apart = jax.jit(lambda x: _images.mixup(jax.random.key(3), 0.5, x)[0])(placed)
    together = _images.mixup(jax.random.key(3), 0.5, jnp.asarray(rows))[0]
    np.testing.assert_allclose(apart, together, rtol=1e-6)
    assert (np.asarray(apart) != rows).all()


def test_perturb_smooths_and_normalises():
    batch = {"image": np.full((2, 8, 8, 1), 255, np.uint8), "label": np.array([1, 4], np.int32)}
    soft = task(label_smoothing=0.1).augment(batch, jax.random.key(0))
    np.testing.assert_allclose(soft["image"], 1.0)
    np.testing.assert_allclose(soft["label"][0], [0.02, 0.92, 0.02, 0.02, 0.02], rtol=1e-6)


def test_float_images_pass_as_the_pipeline_made_them():
    images = np.full((1, 8, 8, 1), 0.25, np.float32)
    np.testing.assert_array_equal(task().inputs({"image": images}), images)


def test_normalising_by_channel():
    found = _images.normalize(jnp.full((1, 2, 2, 3), 10, jnp.uint8), (10, 8, 6), (1, 2, 4))
    np.testing.assert_allclose(found[0, 0, 0], [0, 1, 1])


def sums_of(instance, logits, batch):
    """`eval_sums` of a model that answers with given logits."""

    class Constant:
        def apply(self, _, images):
            return jnp.asarray(logits)

    import dataclasses

    return dataclasses.replace(instance, model=Constant()).eval_sums({}, batch)


LOGITS = np.array(
    [[9, 1, 2, 3, 4, 5], [0, 9, 1, 2, 3, 4], [1, 2, 9, 3, 4, 5], [9, 8, 7, 6, 5, 4]], np.float32
)


def test_metrics_are_what_a_hand_counts():
    batch = {
        "image": np.zeros((4, 8, 8, 1), np.uint8),
        # Right; wrong but among the five best; wrong and the worst; padding that would be right.
        "label": np.array([0, 2, 0, 0], np.int32),
        "mask": np.array([1, 1, 1, 0], np.float32),
    }
    instance = task(info(6))
    found = instance.metrics(jax.device_get(sums_of(instance, LOGITS, batch)))
    losses = -jax.nn.log_softmax(LOGITS)[np.arange(3), batch["label"][:3]]
    assert found["num_examples"] == 3
    assert found["accuracy"] == 1 / 3
    assert found["top5_accuracy"] == 2 / 3
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-6)


def test_rows_without_labels_count_for_the_loss_only():
    labels = np.zeros((4, 6), np.float32)
    labels[0, [0, 3]] = 1  # The top class is one of two.
    labels[1, 5] = 1
    batch = {
        "image": np.zeros((4, 8, 8, 1), np.uint8),
        "label": labels,
        "mask": np.array([1, 1, 1, 0], np.float32),
    }
    instance = task(info(6, label=(6,)), loss="sigmoid")
    found = instance.metrics(jax.device_get(sums_of(instance, LOGITS, batch)))
    assert found["num_examples"] == 3
    assert found["accuracy"] == 1 / 2


def test_sections_and_captions(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "confusion_matrix", lambda matrix, names: drawn.append(matrix))
    instance = task(info(3))
    probability = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], np.float32)
    examples = {
        "image": np.zeros((3, 8, 8, 1), np.uint8),
        "label": np.array([0, 1, 2]),
        "probability": probability,
    }
    assert instance.summaries(examples) == ["0 80%", "0 60%", "2 70%"]
    sections = instance.sections(examples)
    titles = {section.title: section.text for section in sections}
    assert "mistake is 1 predicted as 0: 1 of the images" in sections[0].alt
    assert [row[2] for row in sections[0].numbers] == ["recall", "100.0%", "0.0%", "100.0%"]
    assert len(sections[1].numbers) == 4
    assert titles["The hardest mistakes"].startswith("1 of 3 images are misclassified.")
    assert "Confusion matrix" in titles
    # Confidences of 0.8, 0.6 (wrong) and 0.7, in a bin each.
    assert f"is {(0.2 + 0.6 + 0.3) / 3:.1%} for these 3 images" in titles["Reliability diagram"]
    np.testing.assert_array_equal(drawn, [[[1, 0, 0], [1, 0, 0], [0, 0, 1]]])  # Rows are the truth.
    probability[:2] = np.nan
    *_, hardest = instance.sections(examples)
    assert hardest.text == (
        "2 of 3 images are misclassified. The probabilities of 2 of them are not finite."
    )
    np.testing.assert_array_equal(drawn[1], np.diag([0, 0, 1]))


def test_data_that_does_not_fit_is_shown_beside_what_is_wanted():
    with pytest.raises(UserError, match=r"float32 \[3\].*config\.data.*float32 \[4\]"):
        task(info(3, label=(4,)))
    with pytest.raises(UserError, match="height, width, channels"):
        task(info(3, image=(8, 8)))


def test_patches_that_do_not_tile_must_be_allowed():
    with pytest.raises(UserError, match="crop_to_patches"):
        task(info(image=(9, 8, 1)))
    assert task(info(image=(9, 8, 1)), crop_to_patches=True).crop_to_patches


def test_cells_of_a_stem_count():
    """Patches of 8 cells, which are 4 pixels each."""
    hybrid = {"name": "r_ti16", "depth": 1}
    with pytest.raises(UserError, match="40×40 pixels into tokens of 32×32"):
        tasks.build({"name": "classification"}, hybrid, info(image=(40, 40, 3)))
    tasks.build({"name": "classification"}, hybrid, info(image=(64, 64, 3)))


def softmax_terms(logits):
    return -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))


def test_class_weights_are_pytorchs_weighted_mean():
    logits = np.array([[1.0, 2.0, 0.5], [0.2, -1.0, 1.5]], np.float32)
    labels = np.array([[1, 0, 0], [0, 0.25, 0.75]], np.float32)
    weights = np.array([1.0, 2.0, 4.0])
    losses, counts = task(info(3), class_weights=(1.0, 2.0, 4.0))._weighted_losses(logits, labels)
    np.testing.assert_allclose(
        losses, (weights * labels * softmax_terms(logits)).sum(-1), rtol=1e-5
    )
    np.testing.assert_allclose(counts, [1.0, 3.5], rtol=1e-6)


def test_class_weights_of_sigmoid_losses_multiply_each_class():
    logits = np.array([[1.0, 2.0, 0.5]], np.float32)
    labels = np.array([[1, 0, 1]], np.float32)
    weighted = task(info(3), loss="sigmoid", class_weights=(1.0, 2.0, 4.0))
    losses, counts = weighted._weighted_losses(logits, labels)
    p = 1 / (1 + np.exp(-logits[0]))
    expected = -np.log(p[0]) - 2 * np.log(1 - p[1]) - 4 * np.log(p[2])
    np.testing.assert_allclose(losses, [expected], rtol=1e-5)
    np.testing.assert_array_equal(counts, [1.0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_weights": (1.0, 2.0)}, "one for each of the 5 classes"),
        ({"multihot_mixing": True}, "loss='sigmoid'"),
        ({"multihot_mixing": True, "loss": "sigmoid", "label_smoothing": 0.1}, "smoothing=0"),
        ({"loss": "softmx"}, "softmax or sigmoid"),
        ({"mixup": "abc"}, "config.task.mixup='abc': write a number"),
        ({"mixup": -1}, "config.task.mixup=-1: write 0 or more"),
        ({"erasing": 3}, "config.task.erasing=3: write a number from 0 to 1"),
        ({"label_smoothing": 2.0}, "smoothing=2.0: write a number from 0 to 1"),
        ({"mean": "x"}, "config.task.mean='x': write a list of numbers"),
        ({"mean": (1, 2, 3)}, "mean has 3 numbers for 1 channels"),
        ({"std": (0.0,)}, "write positive numbers"),
        ({"std": ()}, "std has 0 numbers"),
        ({"class_weights": "abc"}, "class_weights='abc': write balanced, or numbers"),
        ({"affine": 3}, "affine=3: write {'name': value, ...}"),
        ({"crop_to_patches": "no"}, "crop_to_patches='no': write true or false"),
        ({"lora": 8}, "config.task.lora=8: write {'rank': 8}"),
    ],
)
def test_fields_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        task(**fields)


@pytest.mark.parametrize("num_classes", [0, 4])
def test_the_classes_are_those_of_the_data(num_classes):
    model = {**TINY, "num_classes": num_classes}
    with pytest.raises(UserError, match=f"num_classes={num_classes}, but the data has 5 classes"):
        tasks.build({"name": "classification"}, model, info())


def test_mixed_images_are_examples_of_both_classes():
    batch = {
        "image": np.zeros((4, 8, 8, 1), np.uint8),
        "label": np.array([0, 1, 1, 4], np.int32),
    }
    mixing = task(loss="sigmoid", mixup=0.8, multihot_mixing=True)
    labels = mixing.augment(batch, jax.random.key(0))["label"]
    expected = np.maximum(np.eye(5)[batch["label"]], np.eye(5)[np.roll(batch["label"], 1)])
    np.testing.assert_array_equal(labels, expected)


def test_erased_boxes_are_noise_of_the_papers_size():
    images = jnp.zeros((512, 24, 32, 3))
    erased = np.asarray(_images.erase(jax.random.key(0), 0.5, images))
    changed = (erased != 0).all(-1)
    assert np.array_equal(changed, (erased != 0).any(-1))
    share = changed.mean((1, 2))
    # Every one of the ten boxes would have to be too long for an image to escape.
    assert 0.42 < (share > 0).mean() < 0.58
    assert share[share > 0].min() > 0.01
    assert share.max() < 0.4
    for mask in changed[share > 0]:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns[None])
        assert np.ptp(np.flatnonzero(rows)) == rows.sum() - 1
    heights = changed.any(2).sum(1)[share > 0] / changed.any(1).sum(1)[share > 0]
    assert 0.2 < heights.min() < 0.6
    assert 1.6 < heights.max() < 4.2
    for sides in (changed.any((0, 2)), changed.any((0, 1))):
        assert sides.all()  # The first and the last ones too.
    assert abs(centers_correlation(changed[share > 0])) < 0.2
    noise = erased[changed]
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)


def test_erasing_keeps_what_mixing_drew():
    batch = {
        "image": np.full((4, 8, 8, 1), 200, np.uint8),
        "label": np.array([0, 1, 2, 4], np.int32),
    }
    plain = task(mixup=0.2).augment(batch, jax.random.key(5))
    erased = task(mixup=0.2, erasing=1.0).augment(batch, jax.random.key(5))
    np.testing.assert_array_equal(plain["label"], erased["label"])
    assert (np.asarray(plain["image"]) != np.asarray(erased["image"])).any()
