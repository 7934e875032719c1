"""Neighbors and linear classifiers on frozen features equal the protocols of DINO and DINOv2."""

from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import pytest
import self_supervised_golden as golden

from vit_jax import tasks
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.inference import linear_probe
from vit_jax.models.intermediate import LastLayers
from vit_jax.optim import schedules
from vit_jax.parallel import sharding
from vit_jax.training import probes, sgd_probes
from vit_jax.training.neighbors import Labelled, accuracy, neighbor_votes
from vit_jax.training.ridge import least_squares
from vit_jax.types import ArraySpec, DataInfo


def splits(found):
    return (
        Labelled(found[f"{name}_features"], found[f"{name}_labels"]) for name in ("train", "test")
    )


def test_neighbors_of_dino():
    found, about = golden.arrays("knn_dino"), golden.settings("knn_dino")
    train, test = splits(found)
    for count, temperature, *expected in found["f64/k_T_top1_top5_top5min_top5max"]:
        k = int(count)
        votes = neighbor_votes(
            train, test.features, about["ncls"], counts=[k], temperature=temperature
        )[k]
        assert 100 * accuracy(votes, test.labels) == pytest.approx(expected[0])
        top = 100 * accuracy(votes, test.labels, top=min(5, k))
        assert expected[2] - 1e-6 <= top <= expected[3] + 1e-6


def test_neighbors_of_dinov2():
    found, about = golden.arrays("knn_dinov2"), golden.settings("knn_dinov2")
    train, test = splits(found)
    votes = neighbor_votes(
        train, test.features, about["ncls"], counts=about["k"], shares=True,
        temperature=about["temperature"],
    )  # fmt: skip
    for k, scores in votes.items():
        golden.assert_near(scores, found[f"scores_k{k}"])
        assert 100 * accuracy(scores, test.labels) == pytest.approx(float(found[f"f64/top1_k{k}"]))


def classifier(flat, prefix=""):
    kernel, bias = flat[f"{prefix}linear.weight"].T, flat[f"{prefix}linear.bias"]
    return {"kernel": kernel[None], "bias": bias[None]}


def test_linear_classifiers_of_dino():
    found, about = golden.arrays("linear_dino"), golden.settings("linear_dino")
    for name, case in about["cases"].items():
        if isinstance(case, str):
            continue
        of = golden.below(found, f"{name}/")
        probes = linear_probe.Probes((case["lr"],))
        factor = linear_probe.cosine(case["epochs_total"], case["iters_per_epoch"])
        rates = [case["lr"] * factor(i * case["iters_per_epoch"]) for i in range(3)]
        golden.assert_near(rates, found[f"sched/{name}_lr_per_epoch"], golden.SCHEDULE)
        batches = list(zip(of["features"], found["labels"], strict=True)) * case["epochs_run"]
        init = classifier(golden.below(of, "classifier_init/"))
        params, losses = probes.fit(init, batches, factor)
        golden.assert_near(losses[:, 0], of["losses"])
        expected = classifier(golden.below(of, "classifier_final/"))
        for part, value in expected.items():
            golden.assert_near(params[part], value, golden.TRAINED)


def test_features_of_dino_alternate_class_token_and_mean_patch():
    layers = LastLayers(np.arange(6.0).reshape(1, 2, 3), np.full((1, 2, 4, 3), 7.0))
    expected = [[0, 7, 1, 7, 2, 7], [3, 7, 4, 7, 5, 7]]
    np.testing.assert_array_equal(linear_probe.interleaved(layers), expected)


def test_all_linear_classifiers_of_dinov2_at_once():
    found, about = golden.arrays("linear_dinov2"), golden.settings("linear_dinov2")
    order = about["classifier_order"]
    rates = [rate * about["batch_for_scaling"] / 256 for rate in about["base_lrs"]]
    factor = linear_probe.cosine(about["max_iter"])
    for i, expected in enumerate(found["sched/lr"]):
        golden.assert_near(np.tile(rates, 4) * factor(i), expected, golden.SCHEDULE)
    names = [f"classifiers_dict.{name}." for name in order]
    whole = found["features/blocks4_avgpoolTrue"]
    for i, (blocks, average) in enumerate(((1, False), (1, True), (4, False), (4, True))):
        features = found[f"features/blocks{blocks}_avgpool{average}"]
        parts = [np.split(x, 5, axis=1) for x in whole]
        layers = [LastLayers(np.stack(x[:4]), np.stack(x[4:])[:, :, None]) for x in parts]
        made = [linear_probe.appended(one, blocks, average) for one in layers]
        np.testing.assert_array_equal(np.stack(made), features)
        own = slice(3 * i, 3 * i + 3)
        init, final = (
            jax.tree.map(
                lambda *x: np.concatenate(x),
                *(classifier(golden.below(found, f"classifiers_{when}/"), n) for n in names[own]),
            )
            for when in ("init", "final")
        )
        batches = list(zip(features, found["labels"], strict=True)) * (about["steps"] // 2)
        params, losses = linear_probe.Probes(tuple(rates)).fit(init, batches, factor)
        golden.assert_near(losses, found["losses"][:, own])
        for part, value in final.items():
            golden.assert_near(params[part], value, golden.TRAINED)


def test_the_linear_classifier_of_mae():
    """BatchNorm without scale, and LARS, through the real schedule of the learning rate."""
    found, about = golden.arrays("mae_linear_probe"), golden.settings("mae_linear_probe")
    total, warmup = about["steps"], about["warmup_epochs"] * about["iters_per_epoch"]
    spec = {**default_config().optim.to_dict()["schedule"], "warmup": warmup}
    factor = schedules.build(spec, total_steps=total, duration=int)
    probes = linear_probe.Probes(
        (about["lars_lr"],), batch_norm=True, trust=about["trust_coefficient"]
    )
    params = {
        "kernel": found["init/head.weight"].T[None],
        "bias": found["init/head.bias"][None],
        "mean": np.zeros(32, np.float32),
        "variance": np.ones(32, np.float32),
    }
    velocity = {name: np.zeros_like(params[name]) for name in ("kernel", "bias")}
    for i in range(total):
        features, labels = found["features"][i % 2], found["labels"][i % 2]
        params, velocity, loss = probes.step(params, velocity, features, labels, factor(i))
        golden.assert_near(loss[0], found["losses"][i])
        if i % 2 == 1:
            names = {"kernel": "head_weight", "bias": "head_bias"}
            for ours, theirs in names.items():
                wanted = found[f"{theirs}_per_epoch"][i // 2].T
                golden.assert_near(params[ours][0], wanted, golden.TRAINED)
            for ours, theirs in {"mean": "mean", "variance": "var"}.items():
                golden.assert_near(params[ours], found[f"bn_running_{theirs}_per_epoch"][i // 2])
    logits = probes.logits(params, found["features"][0])[0]
    golden.assert_near(logits, found["eval_logits"], golden.TRAINED)


def test_patches_are_classified_from_frozen_tokens(monkeypatch):
    """Patches are bright or dark, a part of an image is not labeled, and some rows are padding."""
    draw = np.random.default_rng(0)
    marks = draw.integers(0, 2, (24, 4, 4), np.int32).repeat(2, 1).repeat(2, 2)[..., None]
    images = (60 + 120 * marks + draw.integers(0, 40, marks.shape)).astype(np.uint8)
    marks[16:] = 1 - marks[16:]  # Rows that only fill the batch.
    marks[:, :2, :2] = 255
    mask = (np.arange(24) < 16).astype(np.float32)
    batch = {"image": images, "segmentation": marks, "mask": mask}
    spec = {"image": ArraySpec((8, 8, 1), np.dtype(np.uint8))}
    model = {"name": "vit", "patch_size": 2, "width": 8, "depth": 1, "num_heads": 1}
    task = tasks.build({"name": "simmim", "cell": 4}, model, DataInfo(spec, 0))
    params = jax.jit(lambda: nn.unbox(task.init(jax.random.key(0))))()["backbone"]
    settings = {"rates": [1e-6, 3.0], "blocks": [1], "epochs": 15, "batch_norm": True}
    probes = sgd_probes.PatchProbes(task, sharding.data_mesh(jax.devices()[:1]), settings, 2)
    shares = np.asarray(jax.jit(probes.rows, static_argnums=0)(1, params, batch)["shares"])
    assert shares.shape == (24, 16, 2)
    np.testing.assert_array_equal(shares[:, 0], 0)  # Not labeled.
    np.testing.assert_array_equal(shares[:, 1:].sum(-1), 1)
    learned = mock.Mock(wraps=sgd_probes.trained)
    monkeypatch.setattr(sgd_probes, "trained", learned)
    found = probes.measure(params, lambda: [batch], {"val": lambda: [batch]})
    assert learned.call_args.args[0].features.shape == (16 * 16, 8)
    assert found["val"]["sgd_miou_1"] > 0.7
    assert probes.measure(params, lambda: [batch], {"val": lambda: [batch]}) == found
    assert probes._rows._cache_size() == probes._confusions._cache_size() == 1  # For both times.
    perfect, none = np.diag([3, 5]), np.array([[0, 3], [5, 0]])
    assert sgd_probes.mean_iou([none, perfect]) == 1
    assert sgd_probes.mean_iou([none]) == 0


def test_patches_have_the_classes_of_their_own_pixels_where_some_fill_no_patch(monkeypatch):
    """Images have 30x30 pixels, 3x3 patches of 8; marks may be twice as large as the images."""
    tokens = np.eye(4, dtype=np.float32)[np.arange(9) % 2]  # The kernel below answers so.
    layers = mock.Mock(patches=tokens[None, None])
    monkeypatch.setattr(sgd_probes, "last_layers", lambda *_: layers)
    task = mock.Mock(inputs=lambda batch: batch["image"])
    task.model.backbone.patch_size, task.model.backbone.stem_stride = 8, 1
    patches = sgd_probes.PatchProbes(task, None, {}, 3)
    fitted = {"kernel": np.eye(4, 3)[None], "bias": np.zeros((1, 3))}
    for scale in (1, 2):
        size = 8 * scale
        cells = (np.arange(9) % 2).reshape(3, 3).repeat(size, 0).repeat(size, 1)
        marks = np.full((1, 30 * scale, 30 * scale, 1), 2)
        marks[0, : 3 * size, : 3 * size, 0] = cells
        batch = {"image": np.zeros((1, 30, 30, 3)), "segmentation": marks, "mask": np.ones(1)}
        shares = patches.rows(1, {}, batch)["shares"]
        np.testing.assert_array_equal(shares[0], np.eye(3)[np.arange(9) % 2])
        (found,) = patches.confusions(linear_probe.Probes((1.0,)), 1, fitted, {}, batch)
        np.testing.assert_array_equal(found, np.diag([5, 4, 0]) * size**2)


def test_pixels_without_a_finite_answer_are_wrong(monkeypatch):
    tokens, marks = np.full((1, 4, 3), np.nan), np.arange(16).reshape(1, 4, 4, 1) % 2
    found = tokens, (2, 2), marks[..., 0]
    monkeypatch.setattr(sgd_probes.PatchProbes, "_tokens", lambda *_: found)
    fitted = {"kernel": np.zeros((1, 3, 2)), "bias": np.zeros((1, 2))}
    patches = sgd_probes.PatchProbes(None, None, {}, 2)
    batch = {"mask": np.ones(1)}
    found = patches.confusions(linear_probe.Probes((1.0,)), 1, fitted, {}, batch)
    np.testing.assert_array_equal(found, [[[0, 8], [8, 0]]])


def test_features_that_are_not_finite_give_no_right_answer():
    labels = np.repeat([0, 1], 5)
    settings = {"l2": 1.0, "neighbors": [3], "shots": [2], "linear": True}
    for broken in (np.nan, np.inf, 1e38):
        known = Labelled(np.full((10, 4), broken, np.float32), labels)
        known.features[::2] *= -1
        with np.errstate(all="ignore"):
            found = probes.measure(known, known, 2, settings)
        if broken != 1e38:
            assert found == {"knn_3": 0, "fewshot_2": 0, "linear": 0}
    assert accuracy(np.array([[1.0, np.nan], [1.0, 0.0]]), np.array([0, 0]), top=2) == 0.5


def test_an_image_without_a_class_is_not_compared():
    with pytest.raises(UserError, match="the label -1: probes compare images with one class each"):
        Labelled(np.zeros((3, 2), np.float32), np.array([0, -1, 1]))


def test_a_sweep_finds_a_rate_that_learns():
    random = np.random.default_rng(0)
    labels = np.arange(200) % 3
    features = (np.eye(3)[labels] + 0.1 * random.normal(size=(200, 3))).astype(np.float32)
    train, test = Labelled(features[:150], labels[:150]), Labelled(features[150:], labels[150:])
    found = linear_probe.sweep(train, {"val": test}, 3, rates=[1e-6, 1.0], batch_size=50)["val"]
    assert found[1] > 0.95 > found[0]


def test_a_list_of_rates_learns_from_a_single_example():
    linear = linear_probe.Probes([0.1, 1.0], batch_norm=True)
    params = linear.init(jax.random.key(0), 3, 2)
    features, labels = np.ones((1, 3), np.float32), np.array([1])
    fitted, _ = linear.fit(params, [(features, labels)] * 2, lambda _: 1.0)
    assert all(np.isfinite(x).all() for x in fitted.values())
    np.testing.assert_array_equal(linear.answers(fitted, features), [[1], [1]])


def test_rates_are_those_of_a_batch_of_256(monkeypatch):
    rates = []

    def fit(self, params, batches, factor):
        rates.append(self.rates)
        steps = len(list(batches))
        assert [factor(0), factor(steps // 2), factor(steps)] == pytest.approx([1, 0.5, 0])
        return params, None

    monkeypatch.setattr(linear_probe.Probes, "fit", fit)
    train = Labelled(np.zeros((64, 3), np.float32), np.zeros(64, int))
    linear_probe.sweep(train, {}, 3, rates=[1.0, 0.5], batch_size=64)
    assert rates == [(0.25, 0.125)]
    train = Labelled(np.random.default_rng(0).normal(2, 3, (64, 3)), np.zeros(64, int))
    _, params = sgd_probes.trained(train, 3, rates=[1.0], batch_norm=True)
    np.testing.assert_allclose(params["mean"], train.features.mean(0))
    np.testing.assert_allclose(params["variance"], train.features.var(0))


def test_probes_of_an_evaluation_are_the_measures_on_features(caplog):
    draw = np.random.default_rng(0)
    centers = draw.normal(size=(4, 12))

    def split(count):
        labels = np.arange(count) % 4
        noise = draw.normal(size=(count, 12))
        return Labelled((centers[labels] + noise).astype(np.float32), labels)

    train, test = split(80), split(60)
    wanted = {"neighbors": [3, 20], "shots": [5, 50], "linear": True, "l2": 32.0}
    settings = probes.possible(train, 4, wanted)
    assert settings == {**wanted, "shots": [5]} == probes.possible(train, 4, settings)
    (record,) = caplog.records  # Of the first call alone.
    assert "shots: 50 left out, because class 0 has only 20 of the im" in record.getMessage()
    assert probes.possible(train, 5, wanted, "abcde")["shots"] == []
    assert "shots: 5, 50 left out, because class 'e' has only 0 of the im" in caplog.text
    found = probes.measure(train, test, 4, settings)
    assert found.keys() == {"knn_3", "knn_20", "fewshot_5", "linear"}
    votes = neighbor_votes(train, test.features, 4, counts=[3, 20])
    assert found["knn_20"] == accuracy(votes[20], test.labels)
    scores = least_squares(train, test.features, 4, [32.0])[32.0]
    assert found["linear"] == accuracy(scores, test.labels)
    assert min(found.values()) > 0.5
    none = {"neighbors": [], "shots": [], "linear": False, "l2": 32.0}
    assert probes.measure(train, test, 4, none) == {}
