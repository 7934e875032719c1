"""What DINOv3 adds to DINOv2: Gram anchoring, and a frozen teacher with several students."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from self_supervised_tiny import HEAD, MODEL, info

from vit_jax import checkpoints, tasks
from vit_jax.checkpoints.store import Store
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.tasks.losses.gram import gram_losses, resized_tokens

GRAM = {"gram_weight": 2.0, "gram_from": 2, "gram_every": 3, "gram_scale": 2}
WIDE = {**MODEL, "width": 24, "num_heads": 3}
DISTILL = {"model": WIDE, "checkpoint": "nowhere", "head_hidden": 12}
MASKED = {
    "global": np.zeros((4, 2, 8, 8, 3), np.float32),
    "local": np.zeros((4, 2, 4, 4, 3), np.float32),
    "masked": np.zeros((4, 2, 16), bool),
}
STUDENTS = {"small": {**MODEL, "width": 8, "num_heads": 1}}


def build(**fields):
    given = info(local=4)
    if fields.get("gram_scale"):
        large = given.spec["global"]._replace(shape=(2, 16, 16, 3))
        given = given._replace(spec={**given.spec, "global": large})
    task = tasks.build({"name": "dinov2", **HEAD, "koleo_weight": 0.0, **fields}, MODEL, given)
    return task.with_duration(Duration(10, 4, 8))


def drawn(task):
    """Parameters of normal noise, and a batch of 4."""
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: draw.normal(size=x.shape).astype(np.float32), tasks.abstract_params(task)
    )
    spec = {name: task.info.spec[name].shape for name in ("global", "local")}
    batch = {name: draw.integers(0, 256, (4, *s), np.uint8) for name, s in spec.items()}
    return params, batch


def test_the_gram_loss_is_the_mean_over_pairs_of_patches():
    draw = np.random.default_rng(0)
    student, teacher = draw.normal(size=(2, 5, 4)), draw.normal(size=(2, 5, 7))
    grams = []
    for tokens in (student, teacher):
        unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
        grams.append(unit @ unit.transpose(0, 2, 1))
    wanted = np.square(grams[0] - grams[1]).mean((1, 2))
    np.testing.assert_allclose(gram_losses(student, teacher), wanted, rtol=1e-5)
    ramp = np.arange(16.0).reshape(1, 16, 1)
    small = np.asarray(resized_tokens(ramp, (4, 4), (2, 2))).reshape(4)
    assert small[0] < small[1] < small[2] < small[3]
    np.testing.assert_allclose(small + small[::-1], 15, rtol=1e-5)
    rows, columns = np.mgrid[:2, :4].reshape(2, 1, 8, 1).astype(float)  # A grid of 2 × 4.
    np.testing.assert_allclose(resized_tokens(rows, (2, 4), (1, 2))[0, :, 0], 0.5, rtol=1e-5)
    left, right = np.asarray(resized_tokens(columns, (2, 4), (1, 2)))[0, :, 0]
    assert left < 1.5 < right


def test_the_gram_teacher_sees_larger_crops_and_is_renewed_in_time():
    task = build(**GRAM)
    params, batch = drawn(task)
    state = task.init_state(params, None)
    assert state["gram"].keys() == {"backbone"}
    assert [bool(task._renews_gram(s)) for s in range(8)] == [1, 1, 0, 0, 1, 0, 0, 1]
    later = dataclasses.replace(task, gram_period=0)
    assert [bool(later._renews_gram(s)) for s in range(4)] == [1, 1, 0, 0]
    anchored = dataclasses.replace(task, gram_period=0, gram_start=0)
    assert not any(anchored._renews_gram(s) for s in range(4))

    def targets(state, batch):
        return task.add_targets(state, task.augment(batch, jax.random.key(0)), 1)

    seen = jax.eval_shape(targets, state, batch)
    assert seen["gram"].shape == (4, 2, 16, 16, 3)
    assert seen["global"].shape == (4, 2, 8, 8, 3)
    assert seen["gram_tokens"].shape == (4, 2, 16, 16)
    assert seen["gram_counts"].shape == (4,)
    other = {**state, "gram": jax.tree.map(lambda x: x + 1, state["gram"])}
    step = jax.jit(task.next_state)
    for at, source in ((1, lambda after: after["teacher"]), (2, lambda _: other["gram"])):
        after = step(other, params, {}, at)
        wanted = source(after)["backbone"]
        jax.tree.map(np.testing.assert_array_equal, after["gram"]["backbone"], wanted)
    assert task.train_flops() > build().train_flops()


def test_the_gram_loss_counts_from_its_start_on():
    task = build(gram_weight=2.0, gram_from=2)
    params, batch = drawn(task)
    state = task.init_state(params, None)
    state = {**state, "gram": jax.tree.map(lambda x: 1.1 * x + 0.1, state["gram"])}

    @jax.jit
    def losses(step):
        full = task.add_targets(state, task.augment(batch, jax.random.key(0)), step)
        return task.losses(params, full, jax.random.key(1))

    assert not losses(1)["gram"].any()
    found = losses(2)
    assert (found["gram"] > 0).all()
    less = dataclasses.replace(task, gram_weight=1.0)
    gained = task._weighted(found) - less._weighted(found)
    np.testing.assert_allclose(gained, found["gram"], rtol=1e-3)


def test_students_share_the_outputs_of_a_frozen_teacher(monkeypatch):
    task = build(distill=DISTILL, students=STUDENTS, dino_weight=0.5)
    params, batch = drawn(task)
    assert params.keys() >= {"teacher", "students", "backbone"}
    assert params["teacher"]["dino_head"]["dense1"]["kernel"].shape == (24, 12)
    assert task.frozen(params, ["x"]) == ["x", "teacher/.*"]
    state = task.init_state(params, None)
    assert state.keys() == {"teacher", "students"}
    assert task.inference_params(params).keys() == state["teacher"].keys()
    targets = jax.eval_shape(task.add_targets_from, params, state, MASKED, jnp.int32(0))
    assert targets["class_targets"].shape == (4, 2, 8)
    # A frozen teacher is asked, not the average.
    asked = []
    monkeypatch.setattr(type(task), "_add_targets_of", lambda self, *given: asked.append(given))
    task.add_targets_from(params, state, batch, 0)
    assert asked[0][0] is params["teacher"]

    def losses(self, own, batch, key):
        width = own["backbone"]["norm"]["scale"].shape[0] * np.ones(4)
        assert self.model.backbone.width == width[0]
        return {"local": width, "global": width, "ibot": 100 * width, "koleo": width}

    monkeypatch.setattr(type(task), "losses", losses)
    total, count = task.loss_fn(params, batch, None)
    assert (float(total), float(count)) == (4 * 101 * (16 + 8), 4)
    moved = jax.tree.map(lambda x: x + 1, params)
    after = jax.jit(task.next_state)(state, moved, {}, 0)
    for name in ("teacher", "students"):
        steps = jax.tree.map(lambda x, y: np.abs(y - x).max(), state[name], after[name])
        np.testing.assert_allclose(jax.tree.leaves(steps), 0.008, rtol=1e-3)


def test_a_run_is_the_frozen_teacher_of_another(tmp_path, monkeypatch):
    first = tasks.abstract_params(build())
    halves = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), first)
    with Store(tmp_path / "checkpoints") as store:
        store.save(2, {"params": halves, "task_state": {"teacher": halves}}, {})
        store.wait()
    task = build(distill={"model": MODEL, "checkpoint": str(tmp_path)}, students=STUDENTS)
    read = mock.Mock(wraps=checkpoints.load_with_report)
    monkeypatch.setattr(checkpoints, "load_with_report", read)
    loaded = task.loaded_params()["teacher"]
    assert read.call_args.kwargs["lazy"]  # Each device reads its part of a large teacher.
    expected = tasks.abstract_params(task)["teacher"]
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(lambda x: x.shape, expected)
    assert all((np.asarray(x) == 0.5).all() for x in jax.tree.leaves(loaded))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"students": STUDENTS}, "learn from a frozen teacher; write distill too"),
        ({"distill": {"model": WIDE}}, "distill.checkpoint is missing"),
        ({"distill": {**DISTILL, "weight": 1}}, "distill.weight is unknown"),
        ({"distill": DISTILL, "gram_weight": 1.0}, "gram_weight: the Gram teacher is an earlier"),
        ({"gram_scale": 2}, "gram_scale is for Gram anchoring"),
        ({"gram_every": "3 epochs"}, "gram_every is for Gram anchoring"),
        ({"gram_scale": 0, "gram_weight": 1.0}, "gram_scale=0"),
        (
            {"distill": DISTILL, "students": {"a": {**MODEL, "num_classes": 3}}},
            r"config\.task\.students\.a: ",
        ),
        ({"gram_scale": 3, "gram_weight": 1.0}, "gram_scale=3 does not divide"),
        (
            {"distill": {**DISTILL, "model": {**WIDE, "patch_size": 4}}},
            "teacher and students share crops and masks",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        build(**fields)
