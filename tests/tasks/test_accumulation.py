"""For every task and loss: neither micro-batches nor devices change the loss of a batch."""

import functools

import jax
import numpy as np
import pytest

from vit_jax import tasks
from vit_jax.models.heads.two_towers import TowerOutputs
from vit_jax.parallel import sharding
from vit_jax.training import step
from vit_jax.types import ArraySpec, DataInfo

BATCH, SIDE, CLASSES, ROOM = 32, 8, 4, 3
TINY = {"name": "vit", "width": 8, "depth": 1, "num_heads": 2, "patch_size": 2}
TEACHER = {"model": {**TINY, "width": 4}, "checkpoint": "never read"}
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)

# Micro-batches hold every second or fourth row: of every kind of labels some hold more, some none.
EMPTY = np.arange(BATCH) % 4 == 3
ONE_CLASS = np.where(np.arange(BATCH) % 2, 1, RNG.integers(0, CLASSES, BATCH))


def class_labels():
    return {"label": ONE_CLASS.astype(np.int32)}


def several_labels():
    return {"label": np.float32(RNG.random((BATCH, CLASSES)) < 0.4) * ~EMPTY[:, None]}


def segmentations():
    labels = RNG.choice([*range(CLASSES), 255], (BATCH, SIDE, SIDE, 1))
    labels[ONE_CLASS == 1] = np.minimum(labels[ONE_CLASS == 1], 1)
    labels[EMPTY] = 255
    labels[0, 1:] = 255
    return {"segmentation": labels.astype(np.uint8)}


def objects():
    counts = np.where(EMPTY, 0, RNG.integers(0, ROOM + 1, BATCH))
    counts[1::4] = 1
    corners = np.sort(RNG.random((BATCH, ROOM, 2, 2)), axis=2)
    return {
        "boxes": corners.reshape(BATCH, ROOM, 4).astype(np.float32),
        "box_label": np.where(
            np.arange(ROOM) < counts[:, None], ONE_CLASS[:, None] % CLASSES, -1
        ).astype(np.int32),
        "box_crowd": RNG.random((BATCH, ROOM)) < 0.1,
    }


def texts():
    return {"tokens": RNG.integers(0, 9, (BATCH, 5)).astype(np.int32)}


TEXT = {"vocab_size": 9, "width": 8, "depth": 1, "num_heads": 1}
CASES = {
    "softmax": (class_labels, {"name": "classification"}),
    "sigmoid": (class_labels, {"name": "classification", "loss": "sigmoid"}),
    "several labels": (several_labels, {"name": "classification", "loss": "sigmoid"}),
    "weighted softmax": (class_labels, {"name": "classification", "class_weights": [3, 1, 0, 9]}),
    "weighted sigmoid": (
        several_labels,
        {"name": "classification", "loss": "sigmoid", "class_weights": [3.0, 1.0, 0.0, 9.0]},
    ),
    "smooth and mixed": (
        class_labels,
        {"name": "classification", "label_smoothing": 0.1, "mixup": 0.5, "cutmix": 0.5}
        | {"class_weights": [3.0, 1.0, 0.5, 9.0]},
    ),
    "distilled": (
        class_labels,
        {"name": "classification", "distill": TEACHER, "class_weights": [3.0, 1.0, 0.0, 9.0]},
    ),
    "distilled, hard": (
        class_labels,
        {"name": "classification", "distill": {**TEACHER, "kind": "hard"}},
    ),
    "adapted": (class_labels, {"name": "classification", "lora": {"rank": 2}}),
    "pixels": (segmentations, {"name": "segmentation"}),
    "dice": (segmentations, {"name": "segmentation", "dice": 2.0}),
    "focal": (objects, {"name": "detection"}),
    "boxes softmax": (objects, {"name": "detection", "loss": "softmax"}),
    "mosaics": (objects, {"name": "detection", "loss": "softmax", "mosaic": 1.0}),
    "contrast softmax": (texts, {"name": "contrastive", "text": TEXT, "dim": 8, "chunk": 8}),
    "contrast sigmoid": (
        texts,
        {"name": "contrastive", "text": TEXT, "dim": 8, "loss": "sigmoid", "lora": {"rank": 1}},
    ),
}


def make_task(batch, fields):
    spec = {name: ArraySpec(x.shape[1:], x.dtype) for name, x in batch.items()}
    return tasks.build(fields, TINY, DataInfo(spec, CLASSES))


@functools.cache  # Two tests use the same programs.
def loss_and_grads(case, accum_steps, devices):
    """The task of a case, and a compiled `(params, batch) → (loss, gradients)`."""
    make_labels, fields = CASES[case]
    task = make_task({"image": IMAGES, **make_labels()}, fields)
    sizes = {"data": devices, "fsdp": 1, "tensor": 1}
    mesh = sharding.make_mesh(sizes, jax.devices()[:devices])

    @functools.partial(
        jax.jit,
        in_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )
    def run(params, batch):
        batch = task.augment(batch, jax.random.key(1))
        key = jax.random.key(2)
        return step._loss_and_grads(
            task, lambda x: x, params, batch, key, accum_steps=accum_steps, mesh=mesh
        )

    def run_on_mesh(params, batch):
        with sharding.activate(mesh):
            return jax.device_get(run(params, batch))

    return task, run_on_mesh


def random_params(task):
    noise = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: noise.normal(0, 0.3, x.shape).astype(np.float32), tasks.abstract_params(task)
    )


# The default suite has these in their harder forms: weighted, mixed, mosaics, with dice, hard.
PLAIN = (
    "softmax", "sigmoid", "several labels", "weighted softmax", "pixels", "distilled",
    "boxes softmax", "contrast sigmoid",
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.soak) if case in PLAIN else case for case in CASES],
)
def test_micro_batches_and_devices_do_not_change_the_loss(case, monkeypatch):
    # Compiling the sampler of Beta variables takes a second each time; others test it.
    uniform = jax.random.uniform
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b, shape=(): uniform(key, shape))
    batch = {"image": IMAGES, **CASES[case][0]()}
    task, run = loss_and_grads(case, 1, 1)
    params = random_params(task)
    loss, grads = run(params, batch)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
    assert np.isfinite(norm)
    assert norm > 1e-3
    again = loss_and_grads(case, 4, 2)[1](params, batch)
    np.testing.assert_allclose(again[0], loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * norm), again[1], grads
    )


@pytest.mark.parametrize("case", ["dice", pytest.param("focal", marks=pytest.mark.soak), "mosaics"])
def test_a_batch_without_any_label_has_a_finite_loss(case):
    batch = {"image": IMAGES, **CASES[case][0]()}
    for name, nothing in (("segmentation", 255), ("box_label", -1)):
        if name in batch:
            batch[name] = np.full_like(batch[name], nothing)
    programs = [loss_and_grads(case, n, m) for n, m in ((1, 1), (4, 2))]
    params = random_params(programs[0][0])  # Equal ones have no variance.
    found = [run(params, batch) for _, run in programs]
    jax.tree.map(lambda *x: np.testing.assert_allclose(*x, rtol=1e-4, atol=1e-6), *found)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_micro_batches_of_pairs_draw_their_own_dropout(monkeypatch):
    task = make_task({"image": IMAGES, **texts()}, {"name": "contrastive", "text": TEXT, "dim": 2})
    seen = []

    def outputs(self, params, batch, key):
        words = (jax.random.key_data(key) >> 8).astype(np.float32)[None]
        return TowerOutputs(image=words, text=words, scale=words[0, 0], bias=words[0, 0])

    monkeypatch.setattr(type(task), "_outputs", outputs)
    monkeypatch.setattr(type(task), "_loss", lambda self, found: seen.append(found.text))
    parts = {name: x[:2][:, None] for name, x in {"image": IMAGES, **texts()}.items()}
    task.loss_fn_of_parts({}, parts, jax.random.key(0))
    first, second = np.asarray(seen[0])
    assert (first != second).any()
