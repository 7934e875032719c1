"""Detectors of transformers, against what that library computed (record_hf.py)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import models
from vit_jax.__main__ import main
from vit_jax.checkpoints import loading
from vit_jax.checkpoints.fit.inference import infer_config
from vit_jax.errors import UserError
from vit_jax.inference import convert
from vit_jax.inference.predict import Predictor

GOLDEN = Path(__file__).parent.parent / "golden" / "hf_tiny"
IMAGES = np.load(GOLDEN / "images.npz")["images"]


def recorded(case):
    return np.load(GOLDEN / case / "io.npz")


def corners(boxes):
    """Returns DETR's boxes (center x, y, width, height) as (y0, x0, y1, x1)."""
    center, half = boxes[..., 1::-1], boxes[..., :1:-1] / 2
    return np.concatenate([center - half, center + half], axis=-1)


def check(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["", pytest.param("wide_", marks=pytest.mark.soak)])
def test_yolos_finds_what_it_finds_in_the_real_library(kind):
    """At the size that it was made for, and at another, to which all its positions are resized."""
    images = np.concatenate([IMAGES, IMAGES[:, :, :8]], axis=2) if kind else IMAGES
    model, params, _ = convert.open_model(str(GOLDEN / "yolos"), image_size=images.shape[1:3])
    with jax.default_matmul_precision("highest"):
        scores, boxes = jax.jit(model.apply)({"params": params}, images)
    expected = recorded("yolos")
    check(scores, expected[f"{kind}scores"])
    check(boxes, corners(expected[f"{kind}boxes"]))


@pytest.mark.parametrize("case", [pytest.param("owlvit", marks=pytest.mark.soak), "owlv2"])
def test_owl_finds_what_texts_name_as_in_the_real_library(case):
    expected = recorded(case)
    folder = str(GOLDEN / case)
    predictor = Predictor.from_checkpoint(folder, texts=expected["texts"][:3].tolist())
    np.testing.assert_array_equal(predictor.task.model.texts, expected["tokens"][:3])

    def compute(params, images):
        return predictor.task.model.apply({"params": params}, images, mutable=["intermediates"])

    with jax.default_matmul_precision("highest"):
        (scores, boxes), sown = jax.jit(compute)(predictor.params, IMAGES)
    check(scores, expected["scores"])
    check(boxes, corners(expected["boxes"]))
    if case == "owlv2":
        check(sown["intermediates"]["objectness"][0], expected["objectness"])


def test_a_detector_that_reads_texts_asks_for_them(capsys):
    assert main(["predict", f"--checkpoint={GOLDEN / 'owlv2'}", str(GOLDEN / "photo.png")]) == 2
    assert "write --text=TEXT once for each" in capsys.readouterr().err


@pytest.mark.soak
def test_predict_prints_the_boxes_of_what_texts_name(capsys):
    argv = ["predict", f"--checkpoint={GOLDEN / 'owlv2'}", str(GOLDEN / "photo.png")]
    assert main([*argv, "--text=a cat", "--text=a dog", "--top=2"]) == 0
    first, *_ = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert "a cat  (" in first or "a dog  (" in first


def test_an_encoder_is_read_without_the_head_that_detects():
    weights = loading.read_weights(GOLDEN / "yolos")
    encoder = models.build(**infer_config(weights))
    _, report = loading.fit(weights, encoder, "yolos")
    assert "decoder/box/dense1/kernel: of another task" in report.ignored
    ignored = loading.read_weights(GOLDEN / "owlv2").ignored
    assert "class_head.dense0.weight: of detection" in ignored


def test_positions_of_blocks_are_of_all_patches():
    fields = {"width": 8, "depth": 1, "num_heads": 1, "patch_size": 4, "block_positions": True}
    with pytest.raises(UserError, match="block_positions keep the grid; write patch_drop=0"):
        models.build("vit", patch_drop=0.5, **fields)
