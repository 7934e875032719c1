"""Files tell their names, sizes and preparation, or an error or a warning says what they lack."""

import json
import os

import flax.linen as nn
import jax
import numpy as np
import pytest
from photographs import CLASSES
from PIL import Image

from vit_jax.__main__ import main
from vit_jax.checkpoints.input_spec import InputSpec
from vit_jax.errors import UserError
from vit_jax.inference import fewshot, predict
from vit_jax.inference.predict import Predictor
from vit_jax.inference.preparation import Pictures, exif_of, find_images, fit, fit_placement
from vit_jax.training.evaluate import evaluate_checkpoint
from vit_jax.training.initial_state import first_state
from vit_jax.training.run import Run


def test_a_workdir_given_as_a_checkpoint_is_prepared_for_as_the_run_is(
    folder_config, left_by_a_run, tmp_path, photos
):
    config = folder_config("decode|resize(8)", task__mean=(100.0,), task__std=(40.0,))
    left_by_a_run(config, tmp_path, classes=CLASSES)
    paths = find_images([str(photos)])
    expected = Predictor.from_workdir(str(tmp_path)).predict(paths)["probability"]
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "1"):
        found = Predictor.from_checkpoint(str(path)).predict(paths)["probability"]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_another_size_than_the_run_has_is_said_and_keeps_its_statistics(
    folder_config, left_by_a_run, tmp_path, caplog
):
    config = folder_config("decode|resize(8)", task__mean=(100.0,), task__std=(40.0,))
    left_by_a_run(config, tmp_path, classes=CLASSES)
    predictor = Predictor.from_checkpoint(str(tmp_path), image_size=(12, 12))
    assert "assumed: mean 100, std 40 of 0..255, shorter side resized" in caplog.text
    assert (predictor.task.mean, predictor.task.std) == ((100.0,), (40.0,))
    (batch,) = predictor.batches([np.zeros((5, 5, 3), np.uint8)])
    assert batch["image"].shape == (1, 12, 12, 3)


def test_photographs_are_turned_where_the_source_of_the_evaluation_turns_them(tiny_config):
    for source, args, expected in (
        ("tfds", {}, "ignore"),
        ("folder", {}, "apply"),
        ("folder", {"exif": "ignore"}, "ignore"),
        ("npz", {}, "apply"),
        ("not_installed:Source", {}, "apply"),
    ):
        config = tiny_config(data__source=source)
        config.data.args = args
        config.eval.sets = {"val": {"split": "val"}}
        assert exif_of(config) == expected
        config.eval.sets = {"val": {"source": "tfds", "args": {}}}
        assert exif_of(config) == "ignore"


def test_folders_and_patterns_of_image_files(tmp_path):
    for name in (
        "b.png",
        "a.JPG",
        "sub/c.jpeg",
        "._x.jpg",
        ".ipynb_checkpoints/d.png",
        "notes.txt",
    ):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.png").write_bytes(b"")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "round").symlink_to(tmp_path / "photos")

    def found(*paths):
        root = str(tmp_path / "photos")
        return [os.path.relpath(path, root) for path in find_images(map(str, paths))]

    photos = tmp_path / "photos"
    assert found(photos) == ["a.JPG", "b.png", "linked/e.png", "sub/c.jpeg"]
    assert found(photos / "b.png", photos / "sub") == ["b.png", "sub/c.jpeg"]
    assert found(photos / "*.png") == ["b.png"]
    assert found(photos / "s*/*.jpeg") == ["sub/c.jpeg"]
    (photos / "[1].png").write_bytes(b"")
    assert found(photos / "[1].png") == ["[1].png"]
    with pytest.raises(UserError, match="no file matches this pattern"):
        found(photos / "*.webp")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image files"):
        found(tmp_path / "empty")


def test_what_is_no_image_is_one_line(folder_config, left_by_a_run, tmp_path, capsys):
    left_by_a_run(folder_config("decode|resize(8)"), tmp_path / "run", classes=CLASSES)
    files = {
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "empty.png": b"",
        "text.png": b"not a picture",
        "cut.png": None,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content or b"")
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in (*files, "pipe.jpg", "missing.jpg"):
        for command in (["predict"], ["features", f"--out={tmp_path}/f.npz"]):
            argv = [*command, f"--workdir={tmp_path / 'run'}", str(tmp_path / name)]
            assert main(argv) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert line.startswith("error: ")
            assert name in line


def test_names_from_files_cannot_control_the_terminal(
    folder_config, left_by_a_run, tmp_path, capsys
):
    names = ("plain", "red\x1b[31m\nalert", "caf\u00e9")
    left_by_a_run(folder_config("decode|resize(8)"), tmp_path / "run", classes=names)
    path = tmp_path / "a\x1b[2Jb.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    assert main(["predict", f"--workdir={tmp_path / 'run'}", str(path)]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 4
    assert "\x1b" not in printed
    assert r"red\x1b[31m alert" in printed
    assert "café" in printed


def test_a_folder_is_answered_in_batches_and_its_first_images_are_drawn(
    folder_config, left_by_a_run, tmp_path, capsys, photos
):
    left_by_a_run(folder_config("decode|resize(8)"), tmp_path, classes=CLASSES)
    argv = ["predict", f"--workdir={tmp_path}", str(photos), f"--out={tmp_path}/out.png", "--top=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "BATCH_SIZE", 4)
        assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0::2][:-1] == find_images([str(photos)])
    assert lines[-1] == f"drawn: {tmp_path}/out.png (the first 4 images)"


def test_labels_may_begin_with_a_byte_order_mark(tmp_path, left_by_a_run, folder_config, photos):
    left_by_a_run(folder_config("decode|resize(8)"), tmp_path / "run", classes=CLASSES)
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\nc\r\n")
    run, labels = str(tmp_path / "run"), str(tmp_path / "labels.txt")
    assert Predictor.from_checkpoint(run, labels=labels).info.class_names == ("a", "b", "c")
    assert Predictor.from_checkpoint(run).info.class_names == CLASSES


@pytest.mark.parametrize("size", [(40, 80), (81, 40), (30, 30), (31, 50)])
@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(size=(16, 16)),
        InputSpec(size=(16, 24), crop=0.8),
        InputSpec(size=(16, 16), crop=0.9, keeps_aspect=False),
        InputSpec(size=(16, 16), crop=0.875, rounds_to_even=True, interpolation="bicubic"),
    ],
)
def test_fitted_images_lie_where_their_placement_says(size, spec):
    """Seen in an image whose values are its coordinates."""
    for axis in (0, 1):
        ramp = np.arange(size[axis], dtype=np.uint8)
        ramp = np.broadcast_to(ramp[:, None] if axis == 0 else ramp, size)[..., None]
        fitted = fit(np.ascontiguousarray(ramp), spec)[..., 0].astype(float)
        place = fit_placement(size, spec)
        values = fitted.mean(1 - axis)
        centers = np.arange(len(values)) + 0.5
        expected = place.scale[axis] * centers + place.origin[axis] - 0.5
        np.testing.assert_allclose(values[2:-2], expected[2:-2], atol=1)


def test_a_sliver_is_not_blown_up_beyond_memory():
    sliver = np.zeros((1, 1_000_000, 1), np.uint8)
    with pytest.raises(UserError, match="cannot be resized"):
        fit(sliver, InputSpec(size=(224, 224)))


def test_sizes_are_told_without_decoding(tmp_path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.jpg")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "b.tif")
    pictures = Pictures([str(tmp_path / "a.jpg"), str(tmp_path / "b.tif"), np.zeros((4, 5, 1))])
    assert [pictures.size(number) for number in range(3)] == [(20, 30), (20, 30), (4, 5)]


def test_sizes_are_those_of_upright_images(sideways):
    assert Pictures([sideways]).size(0) == (40, 80)
    assert Pictures([sideways], exif="ignore").size(0) == (80, 40)


def checkpoint_folder(folder, told, file):
    """A transformers folder of a tiny ViT with random parameters, and what tells of images."""
    from vit_jax import checkpoints, models

    model = models.build(
        "vit", num_classes=3, patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=24,
        pooling="token",
    )  # fmt: skip
    images = np.zeros((1, 8, 8, 3), np.float32)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), params)
    checkpoints.save(params, model, folder, "hf")
    (folder / file).write_text(json.dumps(told))
    return model, params


def test_a_transformers_folder_tells_how_images_are_prepared(tmp_path):
    told = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8},
        "resample": 3, "rescale_factor": 0.00392156862745098, "do_rescale": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    model, params = checkpoint_folder(tmp_path / "hf", told, "preprocessor_config.json")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 37, 3), np.uint8)
    image = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC)
    inputs = (np.asarray(image) / 255 - told["image_mean"]) / told["image_std"]
    logits = model.apply({"params": params}, inputs[None].astype(np.float32))
    predictor = Predictor.from_checkpoint(str(tmp_path / "hf"))
    found = predictor.predict([pixels])["probability"]
    np.testing.assert_allclose(found, jax.nn.softmax(logits), atol=1e-5)


def test_what_nothing_tells_is_said(tmp_path, caplog):
    checkpoint_folder(tmp_path / "hf", {}, "unrelated.json")
    Predictor.from_checkpoint(str(tmp_path / "hf"))
    assert "does not tell how to prepare images; assumed: mean 127.5, std 127.5" in caplog.text


def test_evaluation_warns_of_other_statistics(folder_config, left_by_a_run, tmp_path, caplog):
    config = folder_config("decode|resize(8)")
    left_by_a_run(folder_config("decode|resize(8)", task__mean=(100.0,)), tmp_path, classes=CLASSES)
    evaluate_checkpoint(config, str(tmp_path))
    assert "not what" in caplog.text
    caplog.clear()
    evaluate_checkpoint(folder_config("decode|resize(8)", task__mean=(100.0,)), str(tmp_path))
    assert "not what" not in caplog.text


@pytest.mark.parametrize("use", [lambda config: first_state(Run.build(config)), fewshot.run])
def test_starts_teachers_and_features_of_other_statistics_are_warned_of(
    use, folder_config, left_by_a_run, tmp_path, caplog
):
    left_by_a_run(folder_config("decode|resize(8)", task__mean=(100.0,)), tmp_path, classes=CLASSES)
    config = folder_config("decode|resize(8)", init__checkpoint=str(tmp_path))
    if use is not fewshot.run:
        config.task = {
            **config.task.to_dict(),
            "distill": {"checkpoint": str(tmp_path), "model": config.model.to_dict()},
        }
    use(config)
    assert caplog.text.count("not what") == (1 if use is fewshot.run else 2)
