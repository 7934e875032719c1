"""Image files are prepared for a run as its evaluation prepares images; answers are of the file."""

import json
import logging
import os

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax.__main__ import main
from vit_jax.checkpoints.input_spec import InputSpec
from vit_jax.data import images
from vit_jax.data import pp as preprocessing
from vit_jax.data.host_tensorflow import tf
from vit_jax.errors import UserError
from vit_jax.inference import features, predict
from vit_jax.inference.predict import Predictor
from vit_jax.inference.preparation import Pictures, find_images, fit, fit_placement
from vit_jax.parallel import sharding
from vit_jax.training.evaluate import Evaluator, evaluate_checkpoint
from vit_jax.training.run import Run
from vit_jax.types import ArraySpec

CLASSES = ("left", "middle", "right")
SEED = np.array([3, 5], np.int32)
SIZES = ((40, 64), (64, 40), (33, 57), (24, 24), (100, 31), (16, 16))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images of many sizes and formats, whose class is told by one end."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for number, (height, width) in enumerate(SIZES):
            pixels = random.integers(0, 60, (height, width, 3), np.uint8)
            pixels[:, (width * label) // 3 : (width * (label + 1)) // 3] += 150
            ending = ("jpg", "png", "webp", "bmp", "JPEG", "tiff")[number]
            image = Image.fromarray(pixels)
            image = image.convert("L") if number == 4 else image
            image.save(root / name / f"{number}.{ending}")
    return root


@pytest.fixture
def folder_config(tiny_config, photos):
    """`folder_config(pp)`: a run on the photos, evaluated with the preprocessing `pp`."""

    def make(pp, **keys):
        return tiny_config(
            ema_decay=0.0,
            data__source="folder",
            data__name=str(photos),
            data__split="train",
            data__pp=pp,
            data__eval_pp=pp,
            eval__sets__val__split="train",
            task__mixup=0.0,
            **keys,
        )

    return make


def evaluated(config, params):
    """What evaluation makes of the examples, by the name of the file; and the predictions."""
    run = Run.build(config)
    evaluator = Evaluator(config, run.task, run.abstract, run.mesh)
    (split,) = evaluator.splits
    placed = jax.tree.map(sharding.place_whole, params, run.abstract.params)
    examples = evaluator.examples(split, placed, limit=1000)
    names = [split.source.describe(i) for i in range(len(split.source))]
    return names, examples


@pytest.mark.parametrize(
    "pp",
    [
        "decode|resize(8)",
        "decode|resize_small(9, 'bicubic', True)|central_crop(8)",
        "decode|resize((8, 8), antialias=True)|value_range(-1, 1)|keep('image', 'label')",
        "decode|resize(8)|vgg_value_range|onehot(3, key='label')|keep('image', 'label')",
        "decode|central_crop|resize(8)|copy('label', 'labels')",
    ],
)
def test_predict_features_and_evaluate_agree(folder_config, left_by_a_run, tmp_path, pp):
    config = folder_config(pp)
    dtype = np.float32 if "range" in pp else np.uint8
    label = (
        ArraySpec((3,), np.dtype(np.float32)) if "onehot" in pp else ArraySpec((), np.dtype("i4"))
    )
    params = left_by_a_run(
        config, tmp_path, image=((8, 8, 3), dtype), classes=CLASSES, fields={"label": label}
    )
    names, examples = evaluated(config, params)
    predictor = Predictor.from_workdir(str(tmp_path))
    (answers,) = predictor.answers(names)
    np.testing.assert_array_equal(answers.prepared["image"], examples["image"])
    found = answers.outputs["probability"]
    np.testing.assert_allclose(found, examples["probability"], atol=1e-6)
    np.testing.assert_array_equal(found.argmax(1), examples["probability"].argmax(1))

    features.run(names, str(tmp_path / "features.npz"), predictor)
    pooled = np.load(tmp_path / "features.npz")["features"]
    head = params["head"]
    by_features = jax.nn.softmax(pooled @ head["kernel"] + head["bias"])
    np.testing.assert_allclose(by_features, examples["probability"], atol=1e-5)


@pytest.fixture(scope="module")
def sideways(tmp_path_factory):
    """A JPEG file whose EXIF orientation, 6, makes 40 rows of 80 pixels of 80 rows of 40."""
    path = tmp_path_factory.mktemp("sideways") / "photo.jpg"
    colors = np.random.default_rng(0).integers(0, 256, (4, 2, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colors).resize((40, 80), Image.Resampling.BILINEAR).save(path, exif=exif)
    return path


def as_stored(path):
    """The pixels of a JPEG file as TensorFlow decodes them, not turned."""
    record = {"image": tf.constant(path.read_bytes())}
    return preprocessing.build("decode")(record, SEED)["image"].numpy()


def upright(pixels):
    """What orientation 6 says: a quarter turn to the right."""
    return np.ascontiguousarray(np.rot90(pixels, -1))


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_photographs_are_turned_upright_as_evaluation_turns_them(
    folder_config, left_by_a_run, tmp_path, sideways, exif
):
    root, run = tmp_path / "photos", tmp_path / "run"
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        (root / name / f"{name}.jpg").write_bytes(sideways.read_bytes())
    config = folder_config("decode|resize(8)", data__args__exif=exif)
    config.data.name = str(root)
    params = left_by_a_run(config, run, classes=CLASSES)
    names, examples = evaluated(config, params)
    predictor = Predictor.from_workdir(str(run))
    (answers,) = predictor.answers(names)
    np.testing.assert_array_equal(answers.prepared["image"], examples["image"])
    np.testing.assert_allclose(answers.outputs["probability"], examples["probability"], atol=1e-6)

    stored = as_stored(sideways)
    same, other = (upright(stored), stored)[:: 1 if exif == "apply" else -1]
    paths = [str(sideways), str(tmp_path / "same.png"), str(tmp_path / "other.png")]
    Image.fromarray(same).save(paths[1])
    Image.fromarray(other).save(paths[2])
    features.run(paths, str(tmp_path / "features.npz"), predictor)
    for found in (
        predictor.predict(paths)["probability"],
        np.load(tmp_path / "features.npz")["features"],
    ):
        np.testing.assert_array_equal(found[0], found[1])
        assert not np.allclose(found[0], found[2])

    by_size = Predictor.from_checkpoint(str(run), image_size=(12, 12))
    (batch,) = by_size.batches([str(sideways), images.read_pixels(sideways, exif=exif)])
    np.testing.assert_array_equal(*batch["image"])


def test_images_may_be_given_as_pixels(folder_config, left_by_a_run, tmp_path):
    left_by_a_run(folder_config("decode|resize(8)"), tmp_path, classes=CLASSES)
    predictor = Predictor.from_workdir(str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    found = predictor.predict([pixels, str(tmp_path / "image.png"), pixels[:, :, :1]])
    assert found["probability"].shape == (3, 3)
    np.testing.assert_array_equal(found["probability"][0], found["probability"][1])
    with pytest.raises(UserError, match="float64"):
        predictor.predict([pixels / 255])
    with pytest.raises(UserError, match="no images are given"):
        predictor.predict([])


def test_a_run_on_arrays_gets_files_of_its_own_size_as_they_are(
    tiny_config, left_by_a_run, digits_npz, tmp_path
):
    """Evaluation enlarges 8 by 8 pixels; larger files are brought to that size the same way."""
    stored = np.load(digits_npz)["image"][:5]
    paths = []
    for number, pixels in enumerate(stored):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels[..., 0]).save(paths[-1])
    for pp, side in (("", 8), ("resize(12)", 12), ("keep('image', 'label')", 8)):
        config = tiny_config(ema_decay=0.0, data__pp=pp, data__eval_pp=pp)
        workdir = tmp_path / f"run{len(pp)}"
        params = left_by_a_run(config, workdir, image=((side, side, 1), np.uint8), classes=10)
        config.eval.sets = {"val": {"split": "train[:5]"}}
        _, examples = evaluated(config, params)
        (answers,) = Predictor.from_workdir(str(workdir)).answers(paths)
        np.testing.assert_array_equal(answers.prepared["image"], examples["image"])
        large = np.repeat(np.repeat(stored[0], 5, 0), 5, 1)
        (answers,) = Predictor.from_workdir(str(workdir)).answers([large])
        assert answers.prepared["image"].shape == (1, side, side, 1)


def test_what_evaluation_needs_of_labels_is_left_out(
    folder_config, left_by_a_run, tmp_path, photos
):
    pp = "decode|resize(8)|onehot(3, key='label')|keep('image', 'label', 'label')"
    label = {"label": ArraySpec((3,), np.dtype(np.float32))}
    left_by_a_run(folder_config(pp), tmp_path, classes=CLASSES, fields=label)
    found = Predictor.from_workdir(str(tmp_path)).predict([str(photos / "left/0.jpg")])
    assert found["probability"].shape == (1, 3)


BOXES = {
    "boxes": ArraySpec((4, 4), np.dtype(np.float32)),
    "box_label": ArraySpec((4,), np.dtype(np.int32)),
}


@pytest.mark.parametrize(
    ("pp", "inverse"),
    [
        # (prepared row, column) in pixels → of a file of 40 by 80 pixels.
        ("joint_decode|joint_resize(16)", lambda y, x: (y * 40 / 16, x * 80 / 16)),
        ("joint_decode|joint_fit(16)", lambda y, x: (y * 5, x * 5)),
        ("decode|resize_small(20)|central_crop(16)", lambda y, x: (2 * (y + 2), 2 * (x + 12))),
        ("decode|central_crop(16)", lambda y, x: (y + 12, x + 32)),
    ],
)
def test_boxes_are_those_of_the_file(tiny_config, left_by_a_run, tmp_path, pp, inverse):
    config = tiny_config(ema_decay=0.0, data__pp=pp, data__eval_pp=pp)
    config.task = {"name": "detection", "show_above": 0.0, "max_detections": 3}
    left_by_a_run(config, tmp_path, image=((16, 16, 3), np.uint8), fields=BOXES)
    predictor = Predictor.from_workdir(str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
    (answers,) = predictor.answers([pixels])
    batch = answers.prepared
    prepared = predictor._predict(predictor.params, batch)["detected_boxes"]
    prepared = np.asarray(prepared[0])
    content = batch.get("content", np.ones((1, 2)))[0]
    y0, x0, y1, x1 = (prepared * np.tile(content, 2) * 16).T
    expected = np.stack([*inverse(y0, x0), *inverse(y1, x1)], -1) / [40, 80, 40, 80]
    np.testing.assert_allclose(answers.outputs["detected_boxes"][0], expected, atol=2e-3)
    (image,) = answers.images()
    np.testing.assert_array_equal(image, pixels)
    predictor.draw(answers, str(tmp_path / "drawn.png"))
    assert min(Image.open(tmp_path / "drawn.png").size) > 50


@pytest.fixture
def segmenting(tiny_config, left_by_a_run, tmp_path):
    """`segmenting(pp)` → a predictor that segments images of 16 by 16 pixels."""

    def make(pp):
        config = tiny_config(ema_decay=0.0, data__pp=pp, data__eval_pp=pp)
        config.task = {"name": "segmentation"}
        marks = {"segmentation": ArraySpec((16, 16, 1), np.dtype(np.uint8))}
        left_by_a_run(config, tmp_path, image=((16, 16, 3), np.uint8), fields=marks)
        return Predictor.from_workdir(str(tmp_path))

    return make


def test_masks_are_those_of_the_file(segmenting, tmp_path, capsys):
    predictor = segmenting("copy('mask', 'segmentation')|joint_decode|joint_fit(16)")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
    (answers,) = predictor.answers([pixels])
    (mask,) = answers.outputs["predicted"]
    prepared = predictor._predict(predictor.params, answers.prepared)["predicted"][0]
    assert mask.shape == (40, 80)
    np.testing.assert_array_equal(mask, prepared[:8].repeat(5, 0).repeat(5, 1))
    Image.fromarray(pixels).save(tmp_path / "image.png")
    argv = ["predict", f"--workdir={tmp_path}", str(tmp_path / "image.png")]
    assert main([*argv, f"--out={tmp_path}/drawn.png"]) == 0
    shares = [float(line.split("%")[0]) for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_masks_of_a_photograph_are_those_of_the_upright_image(segmenting, sideways, tmp_path):
    predictor = segmenting("copy('mask', 'segmentation')|joint_decode|joint_fit(16)")
    (answers,) = predictor.answers([str(sideways)])
    (mask,) = answers.outputs["predicted"]
    (expected,) = predictor.predict([upright(as_stored(sideways))])["predicted"]
    assert mask.shape == (40, 80)
    np.testing.assert_array_equal(mask, expected)
    (drawn_on,) = answers.images()
    np.testing.assert_array_equal(drawn_on, images.read_pixels(sideways))
    assert drawn_on.shape == (40, 80, 3)


def test_what_is_cut_away_has_no_label(segmenting):
    predictor = segmenting("decode|resize(20)|central_crop(16)")
    (mask,) = predictor.predict([np.zeros((40, 80, 3), np.uint8)])["predicted"]
    assert (mask[:4] == 255).all()
    assert (mask[:, -8:] == 255).all()
    assert (mask[4:-4, 8:-8] < 3).all()


def test_preparation_that_cannot_be_undone_is_said(segmenting, caplog):
    predictor = segmenting("decode|random_affine(rotate=60)|resize(16)")
    with caplog.at_level(logging.WARNING):
        (answers,) = predictor.answers([np.full((40, 80, 3), 200, np.uint8)])
    assert "its preparation cannot be undone" in caplog.text
    assert answers.outputs["predicted"][0].shape == (16, 16)
    assert answers.images()[0].shape == (16, 16, 3)


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
    predictor = Predictor.from_checkpoint(
        str(tmp_path / "run"), labels=str(tmp_path / "labels.txt")
    )
    assert predictor.info.class_names == ("a", "b", "c")


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
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
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
