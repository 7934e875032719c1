"""Images are prepared for a run as its evaluation prepares them; answers are about the file."""

import logging

import jax
import jax.export
import numpy as np
import pytest
from photographs import CLASSES
from PIL import Image

from vit_jax.__main__ import main
from vit_jax.data import images
from vit_jax.data import pp as preprocessing
from vit_jax.data.host_tensorflow import tf
from vit_jax.errors import UserError
from vit_jax.inference import features
from vit_jax.inference import program as program_lib
from vit_jax.inference.predict import Predictor
from vit_jax.parallel import sharding
from vit_jax.training.evaluate import Evaluator
from vit_jax.training.run import Run
from vit_jax.types import ArraySpec

SEED = np.array([3, 5], np.int32)
pytestmark = pytest.mark.usefixtures("one_device")


def evaluated(config, params):
    """Returns the images that evaluation prepares, by the name of the file, and the predictions."""
    run = Run.build(config)
    evaluator = Evaluator(config, run.task, run.abstract, run.mesh)
    (split,) = evaluator.splits
    placed = jax.tree.map(sharding.place_whole, params, run.abstract.params)
    examples = evaluator.examples(split, placed, limit=1000)
    names = [split.source.describe(i) for i in range(len(split.source))]
    return names, examples


EXPORTED = "decode|resize_small(9, 'bicubic', True)|central_crop(8)"


@pytest.mark.parametrize(
    "pp",
    [
        pytest.param("decode|resize(8)", marks=pytest.mark.soak),
        EXPORTED,
        pytest.param(
            "decode|resize((8, 8), antialias=True)|value_range(-1, 1)|keep('image', 'label')",
            marks=pytest.mark.soak,
        ),
        "decode|resize(8)|vgg_value_range|onehot(3, key='label')|keep('image', 'label')",
        "decode|central_crop|resize(8)|copy('label', 'labels')",
    ],
)
def test_predict_features_evaluate_and_the_exported_program_agree(
    folder_config, left_by_a_run, tmp_path, pp
):
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
    if pp == EXPORTED:
        program = program_lib.build(predictor, include_preprocessing=True)
        served = jax.export.deserialize(program.exported.serialize())
        by_program = served.call(program.weights, answers.prepared["image"])["probability"]
        np.testing.assert_allclose(by_program, examples["probability"], atol=1e-5)


def as_stored(path):
    """The pixels of a JPEG file as TensorFlow decodes them, not turned."""
    record = {"image": tf.constant(path.read_bytes())}
    return preprocessing.build("decode")(record, SEED)["image"].numpy()


def upright(pixels):
    """Turns an image a quarter to the right, as orientation 6 asks."""
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
        pytest.param(
            "decode|central_crop(16)", lambda y, x: (y + 12, x + 32), marks=pytest.mark.soak
        ),
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
