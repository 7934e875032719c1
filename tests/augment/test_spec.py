"""One object augments the batches of any task: images, labels of pixels, targets of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import tasks
from vit_jax.augment import randaugment
from vit_jax.augment.images import (
    cutmix,
    distort,
    distort_labels,
    draw_affine,
    draw_elastic,
    erase,
    mixup,
    random_affine,
)
from vit_jax.augment.spec import Augmentation
from vit_jax.errors import UserError
from vit_jax.types import ArraySpec, DataInfo

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 8, 12, 3), np.uint8)
LABELS = np.float32(RNG.random((6, 5)))
MAPS = RNG.integers(0, 4, (6, 8, 12)).astype(np.int32)
KEY = jax.random.key(4)
TINY = {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4}


def halve(images):
    return images / 2


def test_every_change_has_its_own_random_numbers_in_a_fixed_order(monkeypatch):
    """The order of keys and changes is part of the results of recorded runs."""

    def augmented(key, images, num_layers, magnitude):  # The real one takes long to compile.
        noise = jax.random.uniform(key, images.shape)
        return jnp.clip(images + 9 * num_layers * magnitude * noise, 0, 255)

    def beta(key, a, b, shape=()):  # This one, too.
        return a * jax.random.uniform(key, shape)

    monkeypatch.setattr(randaugment, "augment", augmented)
    monkeypatch.setattr(jax.random, "beta", beta)
    coin, mix, erasing, distort, augment = jax.random.split(KEY, 5)
    bounds, layers = {"rotate": 20.0, "shift": 0.1}, {"num_layers": 1, "magnitude": 9.0}
    whole = Augmentation(affine=bounds, randaug=layers, erasing=0.5, mixup=0.4)
    images, targets = jax.jit(lambda x, y: whole(KEY, x, y, halve))(IMAGES, {"label": LABELS})

    @jax.jit
    def in_order(images, labels):
        images = random_affine(distort, images, **bounds)
        images = erase(erasing, 0.5, halve(randaugment.augment(augment, images, **layers)))
        return mixup(mix, 0.4, images, labels)

    expected, labels = in_order(jnp.asarray(IMAGES), LABELS)
    np.testing.assert_allclose(images, expected, atol=1e-5)
    np.testing.assert_allclose(targets["label"], labels, atol=1e-6)

    both = Augmentation(mixup=0.4, cutmix=1.0)
    images, targets = jax.jit(lambda x, y: both(KEY, x, y, halve))(IMAGES, {"label": LABELS})
    one = jax.jit(lambda x, y: mixup(mix, 0.4, x, y))(halve(IMAGES), LABELS)
    other = jax.jit(lambda x, y: cutmix(mix, 1.0, x, y))(halve(IMAGES), LABELS)
    expected, labels = one if jax.random.bernoulli(coin) else other
    np.testing.assert_allclose(images, expected, atol=1e-5)
    np.testing.assert_allclose(targets["label"], labels, atol=1e-6)


def test_groups_of_a_batch_draw_on_their_own():
    """A group is mixed as a batch of its own would be, but that its first row meets the last one
    of the group before it."""
    images, labels = np.float32(RNG.random((12, 8, 8, 3))), np.eye(12, dtype=np.float32)
    whole = Augmentation(mixup=0.8, cutmix=1.0, mixing_groups=4)
    found, targets = jax.jit(lambda x, y: whole(KEY, x, y, lambda x: x))(images, {"label": labels})
    targets, shares = np.asarray(targets["label"]), []
    for group in range(4):
        rows = range(3 * group, 3 * group + 3)
        share = targets[rows[0], rows[0]]
        shares.append(share)
        for row in rows:
            np.testing.assert_allclose(targets[row, row], share, atol=1e-6)
            np.testing.assert_allclose(targets[row, row - 1], 1 - share, atol=1e-6)
            mean = share * images[row] + (1 - share) * images[row - 1]
            pasted = (np.asarray(found[row]) == images[row - 1]).all(-1).mean()
            is_mixed_up = np.allclose(found[row], mean, atol=1e-5)
            assert is_mixed_up or pasted == pytest.approx(1 - share, abs=1e-6)
    assert len(set(np.round(shares, 4))) == 4
    with pytest.raises(UserError, match="mixing_groups=5 does not divide the batch of 12"):
        Augmentation(mixup=0.8, mixing_groups=5)(KEY, images, {"label": labels}, lambda x: x)


def test_nothing_changes_where_nothing_is_asked():
    images, targets = Augmentation()(KEY, IMAGES, {"map": MAPS, "label": LABELS}, halve)
    np.testing.assert_array_equal(images, halve(IMAGES))
    np.testing.assert_array_equal(targets["map"], MAPS)
    np.testing.assert_array_equal(targets["label"], LABELS)


def test_labels_of_pixels_are_pasted_with_their_pixels():
    shown = np.repeat(MAPS[..., None], 3, -1).astype(np.float32)
    images, targets = Augmentation(cutmix=1.0)(
        KEY, shown, {"map": MAPS, "label": LABELS}, lambda x: x
    )
    np.testing.assert_array_equal(targets["map"], images[..., 0])
    assert targets["map"].dtype == np.int32
    pasted = (np.asarray(targets["map"]) == np.roll(MAPS, 1, 0)).all(0)
    share = pasted.mean()
    assert 0 < share < 1
    expected = (1 - share) * LABELS + share * np.roll(LABELS, 1, 0)
    np.testing.assert_allclose(targets["label"], expected, atol=1e-6)


def test_labels_of_pixels_are_distorted_with_their_pixels():
    """Whole pixels are moved, so that nothing is interpolated; nothing is known outside."""
    amounts = np.zeros((6, 5), np.float32)
    amounts[:, 3], amounts[:, 4] = 3 / 12, -2 / 8
    moved = distort_labels(jnp.asarray(MAPS), jnp.asarray(amounts))
    np.testing.assert_array_equal(moved[:, :6, 3:], MAPS[:, 2:, :9])
    assert (np.asarray(moved)[:, 6:] == 255).all()
    assert (np.asarray(moved)[:, :, :3] == 255).all()
    assert moved.dtype == np.int32

    bounds = {"rotate": 15.0, "scale": 0.2, "shear": 5.0}
    coarse = np.kron(RNG.integers(0, 4, (6, 2, 3)), np.ones((4, 4), int)).astype(np.int32)
    shown = np.repeat(coarse[..., None], 3, -1).astype(np.float32)
    images, targets = Augmentation(affine=bounds)(KEY, shown, {"map": coarse}, lambda x: x)
    key = jax.random.split(KEY, 5)[3]
    expected = distort_labels(jnp.asarray(coarse), draw_affine(key, 6, **bounds))
    np.testing.assert_array_equal(targets["map"], expected)
    # Away from the edges of the squares the image shows what the labels say.
    same = np.abs(np.asarray(images)[..., 0] - np.asarray(targets["map"])) < 0.5
    assert same.mean() > 0.6


def test_elastic_distortions_are_smooth_and_move_labels_with_their_pixels():
    """A ramp shows from where each pixel was read."""
    fields = draw_elastic(KEY, 400, (16, 32), deviation=0.03, grid=4)
    assert fields.shape == (400, 2, 16, 32)
    nodes = np.asarray(draw_elastic(KEY, 400, (12, 28), deviation=0.05, grid=4))
    nodes = nodes[:, :, 1::3, 3::7]  # Cells of odd size have a pixel at the very node.
    np.testing.assert_allclose(nodes[:, 0].std(), 0.05 * 12, rtol=0.03)
    np.testing.assert_allclose(nodes[:, 1].std(), 0.05 * 28, rtol=0.03)
    assert np.abs(np.diff(fields, axis=-1)).max() < 1  # No two pixels change places.
    assert abs(np.corrcoef(nodes[:, 0].ravel(), nodes[:, 1].ravel())[0, 1]) < 0.05

    few, still = fields[:3], jnp.zeros((3, 5))
    rows, columns = np.mgrid[:16, :32]
    ramps = jnp.asarray(np.repeat(np.stack([rows, columns], -1)[None], 3, 0), jnp.float32)
    moved = np.moveaxis(np.asarray(distort(ramps, still, few)), -1, 1)
    read = np.stack([rows, columns]) + np.asarray(few)
    inside = ((read >= 0) & (read <= np.array([15, 31]).reshape(2, 1, 1))).all(1, keepdims=True)
    assert inside.mean() > 0.8
    np.testing.assert_allclose(np.where(inside, moved, read), read, atol=1e-4)
    labels = np.asarray(distort_labels(jnp.asarray([columns] * 3, jnp.int32), still, few))
    well = inside[:, 0] & (np.abs(read[:, 1] % 1 - 0.5) > 1e-3)
    np.testing.assert_array_equal(labels[well], np.round(read[:, 1])[well])


def test_elastic_distortions_leave_the_other_random_numbers_alone():
    bounds, elastic = {"rotate": 20.0}, {"deviation": 0.1}
    key = jax.random.split(KEY, 5)[3]
    field = draw_elastic(jax.random.fold_in(key, 1), 6, (8, 12), **elastic)
    expected = distort(jnp.asarray(IMAGES), draw_affine(key, 6, **bounds), field)
    images, _ = Augmentation(affine=bounds, elastic=elastic)(KEY, IMAGES, {}, lambda x: x)
    np.testing.assert_allclose(images, expected, atol=1)
    assert (np.asarray(images) == np.asarray(expected)).mean() > 0.99
    assert (np.asarray(images) != IMAGES).mean() > 0.5


def info(**arrays):
    spec = {name: ArraySpec(x.shape[1:], x.dtype) for name, x in arrays.items()}
    return DataInfo(spec, 4)


def test_tasks_augment_by_the_fields_they_have():
    data = {"image": IMAGES, "segmentation": MAPS[..., None].astype(np.uint8)}
    task = tasks.build({"name": "segmentation", "cutmix": 1.0}, TINY, info(**data))
    found = task.augment(data, KEY)
    images, targets = Augmentation(cutmix=1.0)(
        KEY, jnp.asarray(IMAGES), {"label": MAPS}, lambda x: x / 127.5 - 1
    )
    np.testing.assert_allclose(found["image"], images, atol=1e-6)
    np.testing.assert_array_equal(found["label"], targets["label"])

    data = {"image": IMAGES, "tokens": np.arange(30, dtype=np.int32).reshape(6, 5)}
    text = {"vocab_size": 40, "width": 8, "depth": 1, "num_heads": 1}
    fields = {"name": "contrastive", "dim": 8, "text": text, "randaug": {"magnitude": 9.0}}
    task = tasks.build({**fields, "erasing": 0.5}, TINY, info(**data))
    found = task.augment(data, KEY)
    assert not np.allclose(found["image"], task.inputs(data))
    np.testing.assert_array_equal(found["tokens"], data["tokens"])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("segmentation", {"affine": {"turn": 3.0}}, "affine.turn is unknown"),
        ("segmentation", {"elastic": {"sigma": 3.0}}, "elastic.sigma is unknown"),
        (
            "segmentation",
            {"elastic": {"deviation": -1}},
            "deviation=-1: write a number of at least",
        ),
        ("segmentation", {"elastic": {"deviation": 1, "grid": 1.5}}, "grid=1.5: write a whole"),
        ("segmentation", {"elastic": {"grid": 4}}, "elastic has no deviation"),
        ("segmentation", {"cutmix": -1.0}, "cutmix=-1.0: write 0 or more"),
        ("segmentation", {"mixup": 1.0}, "mixup is no field of task"),
        ("segmentation", {"randaug": {"magnitude": 9}}, "randaug is no field of task"),
    ],
)
def test_what_a_task_cannot_augment_is_refused(name, fields, message):
    data = {"image": IMAGES, "segmentation": MAPS[..., None].astype(np.uint8)}
    with pytest.raises(UserError, match=message):
        tasks.build({"name": name, **fields}, TINY, info(**data))
