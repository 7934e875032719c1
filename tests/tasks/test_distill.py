"""Distillation: the losses against plain formulas, the teacher's part in a run."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vit_jax import checkpoints, models, tasks
from vit_jax.__main__ import main
from vit_jax.checkpoints.store import Store, flatten
from vit_jax.errors import UserError
from vit_jax.tasks._distill import Teacher
from vit_jax.training import initial_state
from vit_jax.training.run import Run
from vit_jax.types import ArraySpec, DataInfo

TINY = {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4}
INFO = DataInfo(
    {
        "image": ArraySpec((8, 8, 1), np.dtype(np.uint8)),
        "label": ArraySpec((), np.dtype(np.int32)),
    },
    num_classes=10,
)


class Answers(nn.Module):
    """A network that gives the logits it was made with."""

    logits: tuple[tuple[float, ...], ...]

    @nn.compact
    def __call__(self, images, *, train=False):
        del train
        return jnp.asarray(self.logits) + 0.0 * images.sum()


STUDENT = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]], np.float32)
TEACHER = ((1.0, 0.0, 2.0), (-1.0, 0.5, 0.0))


def softmax(x):
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def test_soft_loss_is_the_tempered_divergence():
    teacher = Teacher(Answers(TEACHER), "unused", temperature=3.0)
    found = teacher.losses(jnp.asarray(STUDENT), {"teacher": {}}, jnp.zeros((2, 1)))
    p, q = softmax(np.array(TEACHER) / 3), softmax(STUDENT / 3)
    np.testing.assert_allclose(found, 9 * (p * np.log(p / q)).sum(-1), rtol=1e-5)


def test_hard_loss_is_cross_entropy_with_the_teachers_class():
    teacher = Teacher(Answers(TEACHER), "unused", kind="hard")
    found = teacher.losses(jnp.asarray(STUDENT), {"teacher": {}}, jnp.zeros((2, 1)))
    np.testing.assert_allclose(found, -np.log(softmax(STUDENT)[[0, 1], [2, 1]]), rtol=1e-5)


class TwoHeads(nn.Module):
    """A student whose heads answer (`STUDENT`, twice `STUDENT`)."""

    @nn.compact
    def __call__(self, images, *, train=False):
        logits = jnp.asarray(STUDENT) + 0.0 * images.sum()
        return (logits, 2 * logits) if train else 1.5 * logits


def test_objective_weighs_the_two_losses_and_asks_the_token_to_imitate():
    info = INFO._replace(num_classes=3)
    task = tasks.build({"name": "classification"}, TINY, info)
    teacher = Teacher(Answers(TEACHER), "unused", kind="hard", weight=0.25)
    task = dataclasses.replace(task, model=TwoHeads())
    object.__setattr__(task, "teacher", teacher)
    batch = {"image": jnp.zeros((2, 8, 8, 1)), "label": jnp.eye(3)[jnp.array([0, 2])]}
    total, count = task.loss_fn({"teacher": {}}, batch, jax.random.key(0))
    truth = -np.log(softmax(STUDENT)[[0, 1], [0, 2]])
    imitation = -np.log(softmax(2 * STUDENT)[[0, 1], [2, 1]])
    np.testing.assert_allclose(total, (0.75 * truth + 0.25 * imitation).sum(), rtol=1e-5)
    assert count == 2


def test_a_distillation_token_has_its_own_head():
    model = models.build(**TINY, num_classes=10, distill_token=True, head_zero_init=False)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    init = jax.jit(model.init)
    params = nn.unbox(init(jax.random.key(0), images)["params"])
    assert params["head_distill"]["kernel"].shape == (8, 10)
    assert params["backbone"]["distill"].shape == (1, 1, 8)
    apply = jax.jit(model.apply, static_argnames="train")
    first, second = apply({"params": params}, images, train=True)
    assert np.abs(first - second).max() > 1e-3
    mean = apply({"params": params}, images)
    np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-6)
    backbone = models.build(**TINY, distill_token=True)
    features = jax.eval_shape(backbone.apply, {"params": params["backbone"]}, images)
    assert features.grid.shape == (2, 2, 2, 8)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """(path, parameters) of a random teacher in the published format."""
    model = models.build("vit", num_classes=10, width=12, depth=1, num_heads=1, patch_size=4)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: draw(0, 0.1, x.shape).astype(np.float32), shapes["params"])
    path = tmp_path_factory.mktemp("teacher") / "teacher.npz"
    checkpoints.save(params, model, path, "npz")
    return path, params


@pytest.fixture
def distilled(tiny_config, teacher_file):
    """`distilled(**keys)`: the tiny run with the teacher."""
    model = {"name": "vit", "width": 12, "depth": 1, "num_heads": 1, "patch_size": 4}
    distill = {"model": model, "checkpoint": str(teacher_file[0]), "kind": "soft"}

    def make(**keys):
        return tiny_config(task__distill=distill, **keys)

    return make


@pytest.mark.usefixtures("one_device")
def test_teacher_is_loaded_kept_and_never_trained(distilled, teacher_file):
    run = Run.build(distilled(model__distill_token=True))
    state, _ = initial_state.first_state(run)
    frozen = {group.path for group in run.optimizer.describe() if group.frozen}
    assert frozen == {name for name in names(state.params) if name.startswith("teacher/")}
    assert frozen
    with run.open_feed(0) as feed:
        changed, metrics = run.compile_step()(state, feed.next_batch())
    assert np.isfinite(metrics["loss"])
    for name, value in names(teacher_file[1]).items():
        np.testing.assert_array_equal(names(changed.params)[f"teacher/{name}"], value)
    student = {k: v for k, v in names(run.abstract.params).items() if k[:7] != "teacher"}
    assert run.num_params() == sum(leaf.size for leaf in student.values())


def names(tree):
    return {name.replace(".", "/"): leaf for name, leaf in flatten(tree).items()}


@pytest.mark.usefixtures("one_device")
def test_a_distilled_run_is_exported_without_its_teacher(distilled, tmp_path):
    """It is evaluated without its teacher in test_routes.py."""
    run = Run.build(distilled())
    with Store(tmp_path / "checkpoints") as store:
        store.save(1, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), run.abstract), {})
        store.wait()
    loaded = checkpoints.load(tmp_path, run.task.model, image_size=(8, 8), channels=1)
    assert set(loaded) == {"backbone", "head"}


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"checkpoint": "x"}, r"distill\.model is missing"),
        ({"model": {"name": "vit_ti16"}}, r"distill\.checkpoint is missing"),
        ({"teacher": "x"}, r"distill\.teacher is unknown"),
        ({"model": "vit_ti16", "checkpoint": "x"}, "write {'name'"),
        ({"model": TINY, "checkpoint": "x", "kind": "warm"}, "write soft or hard"),
        ({"model": TINY, "checkpoint": "x", "weight": 0.0}, "weight=0"),
        ({"model": TINY, "checkpoint": "x", "temperature": 0.0}, "temperature=0"),
        ({"model": 5, "checkpoint": "x"}, "write {'name'"),
        ({"model": TINY, "checkpoint": 5}, "checkpoint=5: write a text"),
        ({"model": TINY, "checkpoint": "x", "weight": "x"}, "weight='x': write a"),
        ({"model": TINY, "checkpoint": "x", "temperature": True}, "temperature=True: write a"),
        ({"model": TINY, "checkpoint": "x", "temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_mistakes_are_named(distill, message):
    with pytest.raises(UserError, match=message):
        tasks.build({"name": "classification", "distill": distill}, TINY, INFO)


def test_a_section_of_a_config_describes_a_teacher():
    section = ConfigDict({"model": {**TINY, "name": "vit_ti16"}, "checkpoint": "x"})
    assert Teacher.create(section, 10).checkpoint == "x"


def test_what_cannot_go_together():
    distill = {"model": TINY, "checkpoint": "x"}
    task = {"name": "classification", "distill": distill, "lora": {"rank": 1}}
    with pytest.raises(UserError, match="leave one out"):
        tasks.build(task, TINY, INFO)


@pytest.mark.usefixtures("one_device")
def test_a_missing_teacher_is_one_line(digits_npz, request, tmp_path, capsys):
    config = f"--config={request.config.rootpath}/tests/tiny.py:{digits_npz}"
    model = "{'name': 'vit', 'width': 8, 'depth': 1, 'num_heads': 1, 'patch_size': 4}"
    keys = [f"--config.task.distill.model={model}", "--config.task.distill.checkpoint=nowhere.npz"]
    assert main(["train", config, f"--workdir={tmp_path}", *keys]) == 2
    assert "error: config.task.distill: " in capsys.readouterr().err
