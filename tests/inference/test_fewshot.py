"""Least squares and neighbours on frozen features: big_vision's numbers, and whole commands."""

import json
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import checkpoints, models, tasks
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.inference import agreement, features, fewshot
from vit_jax.inference.preparation import AsEvaluated
from vit_jax.training import neighbors, ridge
from vit_jax.training.evaluate import Split
from vit_jax.training.neighbors import Labelled
from vit_jax.training.run import Run

GOLDEN = Path(__file__).parents[1] / "golden" / "big_vision"
CASES = json.loads((GOLDEN / "fewshot_dim24.json").read_text())


@pytest.fixture(scope="module")
def recorded():
    return np.load(GOLDEN / "fewshot_dim24.npz")


@pytest.mark.parametrize(
    "case", CASES["rows"], ids=lambda c: f"{c['shots']}-{c['seed']}-{c['l2_reg']:g}"
)
def test_least_squares_match_big_vision(recorded, case):
    shots, seed, l2 = case["shots"], case["seed"], case["l2_reg"]
    labels = recorded["y_train"]
    rows = fewshot.draw_shots(labels, CASES["num_classes"], shots, seed)
    np.testing.assert_array_equal(rows, recorded[f"idx/seed{seed}/shots{shots}"])
    few = Labelled(recorded["x_train"][rows], labels[rows])
    scores = fewshot.least_squares(few, recorded["x_test"], CASES["num_classes"], [l2])[l2]
    found = fewshot.accuracy(scores, recorded["y_test"])
    assert found == pytest.approx(case["accuracy_float64"], abs=1e-9)
    if seed == 0:
        expected = recorded[f"scores/l2_{l2}/seed0/shots{shots}"]
        largest = np.abs(expected).max()
        np.testing.assert_allclose(scores[: len(expected)], expected, rtol=0, atol=2e-3 * largest)


def test_few_shot_is_the_mean_of_the_seeds(recorded):
    train = Labelled(recorded["x_train"], recorded["y_train"])
    test = Labelled(recorded["x_test"], recorded["y_test"])
    found = fewshot.few_shot(train, test, CASES["num_classes"], l2_regs=[32.0], shots=[5])
    rows = [r for r in CASES["rows"] if (r["shots"], r["l2_reg"]) == (5, 32.0)]
    assert found == {
        "fewshot_5/l2_32": pytest.approx(np.mean([r["accuracy_float64"] for r in rows]))
    }


def test_too_few_examples_name_the_class():
    with pytest.raises(UserError, match="class 1 has 2"):
        fewshot.draw_shots(np.array([0, 0, 0, 1, 1]), 2, 3, seed=0)


def test_a_run_without_evaluation_sets_is_told_or_not_compared():
    config = default_config()
    config.init.checkpoint, config.eval.sets = "x", {}
    with pytest.raises(UserError, match=r"config\.eval\.sets is empty"):
        fewshot.run(config)
    program = SimpleNamespace(outputs={"logits": np.zeros((1, 2))})
    with pytest.raises(agreement.NotMeasured, match=r"^config\.eval\.sets is empty"):
        agreement.of_first_split(config, None, None, program, None)


def test_neighbours_vote_by_cosine():
    """Worked by hand: three neighbours at cosines 1, 0.6 and 0; lengths do not count."""
    train = Labelled(np.array([[1.0, 0], [30, 40], [0, 1], [-1, 0]]), np.array([0, 1, 1, 2]))
    votes = neighbors.neighbor_votes(train, np.array([[5.0, 0]]), 3, counts=[3], temperature=0.5)
    np.testing.assert_allclose(votes[3], [[np.exp(2), np.exp(1.2) + 1, 0]])


def test_pieces_change_nothing(monkeypatch):
    """ImageNet is worked on piece by piece."""
    random = np.random.default_rng(0)
    train = Labelled(random.normal(size=(50, 6)).astype(np.float32), random.integers(0, 3, 50))
    queries = random.normal(size=(9, 6)).astype(np.float32)
    scores = fewshot.least_squares(train, queries, 3, [2.0])[2.0]
    votes = neighbors.neighbor_votes(train, queries, 3)[20]
    monkeypatch.setattr(ridge, "_CHUNK", 7)
    monkeypatch.setattr(neighbors, "_SIMILARITIES", 100)
    np.testing.assert_allclose(fewshot.least_squares(train, queries, 3, [2.0])[2.0], scores)
    in_pieces = neighbors.neighbor_votes(train, queries, 3)[20]
    np.testing.assert_allclose(in_pieces, votes, rtol=1e-6)


def random_like(shapes):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(np.float32), shapes)


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """(file, task) of a random tiny model."""
    task = Run.build(tiny_config()).task
    params = random_like(tasks.abstract_params(task))
    checkpoints.save(params, task.model, tmp_path / "tiny.npz", "npz")
    return str(tmp_path / "tiny.npz"), task


def test_features_of_a_checkpoint_on_the_data_of_a_config(checkpoint, tiny_config, caplog):
    path, _ = checkpoint
    config = tiny_config(init__checkpoint=path, eval__batch_size=7)
    found = fewshot.run(config, shots=[1, 5], seeds=[0], l2_regs=[1024.0])
    voted = [*(f"knn_{count}" for count in neighbors.NEIGHBORS), "knn"]
    names = ["fewshot_1/l2_1024", "fewshot_5/l2_1024", "linear/l2_1024", *voted]
    assert list(found) == [f"val/{name}" for name in names]
    assert found["val/linear/l2_1024"] > 0.3  # Even random features tell digits apart.
    assert found["val/knn"] > 0.3
    probes = {"split": "train", "rates": [1e-6, 3.0], "blocks": [2], "batch_norm": True}
    config.eval.probes = probes
    config.data.eval_pp = "copy('image', 'segmentation')"  # Labels come first.
    found = fewshot.run(config, shots=[5, 1000], seeds=[0], l2_regs=[32.0])
    assert list(found) == [
        "val/fewshot_5/l2_32", "val/linear/l2_32", *(f"val/{name}" for name in voted), "val/sgd_2"
    ]  # fmt: skip
    assert found["val/sgd_2"] > 0.3
    config.eval.probes = {**probes, "blocks": [3]}
    with pytest.raises(
        UserError, match=r"eval.probes.blocks=\[3\]: write one number or more, 1 to 2"
    ):
        fewshot.run(config)
    assert "the smallest class has " in caplog.text
    with pytest.raises(UserError, match=r"config\.init\.checkpoint is empty"):
        fewshot.run(tiny_config())


def test_images_without_one_label_are_refused_before_they_are_embedded(monkeypatch):
    split = Split("train", SimpleNamespace(fingerprint="scenes"), "")
    for label in ({}, {"label": np.zeros((2, 3))}):
        batch = {"image": np.zeros((2, 8, 8, 1)), "mask": np.ones(2), **label}
        monkeypatch.setattr(fewshot, "_batches", lambda *_, batch=batch: [batch])
        with pytest.raises(UserError, match="scenes: few-shot learning wants one label an image"):
            fewshot._rows(None, split, default_config())


def test_features_of_image_files(checkpoint, tmp_path):
    """Files and folders in, one row each out, equal to the backbone's pooled output."""
    path, task = checkpoint
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 8, 8), np.uint8)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    names = ["images/a.png", "images/deep/b.PNG", "single.png"]
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")

    params = features.backbone_params(task, path)
    preparation = AsEvaluated("", task.info.spec["image"].shape)
    predictor = features.Predictor(task, params, task.info, preparation)
    out = tmp_path / "out.npz"
    images = [str(tmp_path / "images"), str(tmp_path / "single.png")]
    said = features.run(images, str(out), predictor)
    written = np.load(out)
    assert "[3, 16]" in said
    assert written["path"].tolist() == [str(tmp_path / name) for name in names]
    inputs = (pixels[..., None] - 127.5) / np.float32(127.5)
    expected = task.model.backbone.apply({"params": params["backbone"]}, inputs).pooled
    np.testing.assert_allclose(written["features"], expected, atol=1e-5)


def test_features_by_the_name_of_a_model(tmp_path):
    fields = {"depth": 1, "width": 16, "num_heads": 2, "mlp_dim": 32}
    model = models.build("vit_b16", num_classes=5, **fields)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = random_like(nn.unbox(shapes))
    checkpoints.save(params, model, tmp_path / "b16.npz", "npz")
    predictor = features.Predictor.from_checkpoint(
        str(tmp_path / "b16.npz"), model="B/16", fields=fields, image_size=(48, 48)
    )
    images = np.zeros((2, 48, 48, 3), np.uint8)
    assert features.Embedder(predictor.task, predictor.params)(images).shape == (2, 16)


def test_features_of_a_convolutional_file_without_a_head(tmp_path):
    fields = {"stages": (1,), "width_factor": 0.5}
    model = models.build("bit_r50x1", **fields)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = random_like(nn.unbox(shapes))
    checkpoints.save(params, model, tmp_path / "bit.npz", "npz")
    with pytest.raises(UserError, match="no classifier head"):
        features.Predictor.from_checkpoint(str(tmp_path / "bit.npz"), image_size=(32, 32))
    with pytest.raises(UserError, match="write --image-size"):
        features.Predictor.from_checkpoint(str(tmp_path / "bit.npz"), headless=True)
    predictor = features.Predictor.from_checkpoint(
        str(tmp_path / "bit.npz"), model="bit_r50x1", headless=True
    )
    assert predictor.info.spec["image"].shape == (224, 224, 3)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    inputs = (images - 127.5) / np.float32(127.5)
    expected = model.apply({"params": params}, inputs).pooled
    actual = features.Embedder(predictor.task, predictor.params)(images)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_paths_without_images_are_user_errors(checkpoint, tmp_path):
    _, task = checkpoint
    preparation = AsEvaluated("", task.info.spec["image"].shape)
    predictor = features.Predictor(task, {}, task.info, preparation)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image files"):
        features.find_images([str(tmp_path / "empty")])
    with pytest.raises(UserError, match=r"absent\.png: No such file"):
        features.find_images([str(tmp_path / "absent.png")])
    (tmp_path / "list.txt").write_text("\ufeffa b.png\r\n\nx/[1].jpg\n")
    assert features.find_images([f"@{tmp_path}/list.txt"]) == ["a b.png", "x/[1].jpg"]
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(UserError, match=r"list.txt: write the name of an image file on each line"):
        features.find_images([f"@{tmp_path}/list.txt"])
    with pytest.raises(UserError, match=r"no.txt: No such file"):
        features.find_images([f"@{tmp_path}/no.txt"])
    with pytest.raises(UserError, match=r"absent\.png: No such file"):
        next(predictor.batches([str(tmp_path / "absent.png")]))
