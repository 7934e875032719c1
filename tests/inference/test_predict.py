"""`predict` on checkpoints: every pooling, images that are not square, the pictures; on runs."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import checkpoints, models, optim, tasks
from vit_jax.__main__ import main
from vit_jax.checkpoints.store import Store
from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.inference import features, predict
from vit_jax.inference.predict import Predictor
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec, DataInfo

BASE = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "num_classes": 3}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture of another size and shape than the model reads."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def saved(path, **fields):
    """Parameters for images of 12 by 12 pixels, as our own checkpoint."""
    model = models.build("vit", **BASE, **fields)
    images = np.zeros((1, 12, 12, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    checkpoints.save(params, model, path, "orbax")


@pytest.mark.parametrize(
    "fields", [{"pooling": "token", "num_registers": 2}, {"pooling": "mean"}, {"pooling": "map"}]
)
def test_pictures_of_every_pooling_and_of_images_that_are_not_square(
    tmp_path, photo, capsys, fields
):
    saved(tmp_path / "checkpoint", **fields)
    argv = ["predict", f"--checkpoint={tmp_path}/checkpoint", "--image-size=8x16", "--top=1"]
    draw = [f"--attention={tmp_path}/attention.png", f"--patches={tmp_path}/patches.png"]
    assert main([*argv, *draw, photo]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].strip().startswith("33.33%")  # a head of zeros
    one = Image.open(tmp_path / "attention.png").size
    assert min(one) > 100
    width, height = Image.open(tmp_path / "patches.png").size
    assert width > height
    assert main([*argv, draw[0], photo, photo]) == 0
    assert Image.open(tmp_path / "attention.png").size != one


def test_patches_are_drawn_at_the_size_that_is_read(tmp_path, monkeypatch):
    """Not at the one that a FlexiViT keeps its kernel at."""
    drawn = []
    monkeypatch.setattr(predict.inside, "image_in_patches", lambda _, patch: drawn.append(patch))
    monkeypatch.setattr(predict, "_write_png", lambda *_: None)
    for sides, patch in ((4, (4, 4)), ((2, 4), (2, 4))):
        fields = {"patch_size": sides, "width": 16, "depth": 1, "num_heads": 2}
        model = models.build("flexivit_s", num_classes=3, **fields)
        task = SimpleNamespace(model=model)
        params = {"backbone": {"patch_embed": {"kernel": np.zeros((32, 32, 3, 16))}}}
        Predictor(task, params, None).draw_patches(np.zeros((8, 8, 3), np.uint8), "x.png")
        assert drawn.pop() == patch


def test_images_of_16_bits_keep_their_greys(tmp_path):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1023
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    info = DataInfo({"image": ArraySpec((8, 8, 3), np.dtype(np.uint8))}, 3)
    (read,) = Predictor(None, {}, info).read([str(tmp_path / "ramp.png")])
    np.testing.assert_array_equal(read, np.repeat(ramp[..., None] >> 8, 3, axis=-1))


@pytest.mark.parametrize("size", ["x", "8x", "0", "-8", "8x8x3", "wide"])
def test_sizes_that_are_none(capsys, photo, size):
    code = main(["predict", "--checkpoint=c.npz", f"--image-size={size}", photo])
    message = capsys.readouterr().err
    assert code == 2
    assert f"{size!r} is no size; write 224, or 192x256" in message


def left_by_a_run(config, path, image_dtype, state=lambda params: {}):
    """A workdir as training would leave it, with random parameters; and those.

    state: of the optimizer, from the parameters.
    """
    label = ArraySpec((), np.dtype(np.int32))
    info = DataInfo({"image": ArraySpec((8, 8, 3), np.dtype(image_dtype)), "label": label}, 3)
    workdir = Workdir.open(str(path))
    workdir.write_config(config, info, headline="accuracy", metric_info={})
    shapes = tasks.abstract_params(tasks.build(config.task, config.model, info))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    store = Store(workdir.checkpoints)
    store.save(1, {"params": params, "opt_state": state(params)}, {})
    store.close()
    return params


def test_images_of_files_get_the_range_that_the_run_was_trained_on(tiny_config, tmp_path):
    """Where the host normalised, as big_vision's strings do, `predict` and `features` do too."""
    pp = "vgg_value_range|random_affine(rotate=3)|keep('image', 'label')"
    config = tiny_config(ema_decay=0.0, data__pp=pp)
    params = left_by_a_run(config, tmp_path, np.float32)
    predictor = Predictor.from_workdir(str(tmp_path))
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inputs = ((images / 255 - mean) / std).astype(np.float32)
    expected = jax.nn.softmax(predictor.task.model.apply({"params": params}, inputs))
    np.testing.assert_allclose(predictor.predict(images)["probability"], expected, atol=1e-5)
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    features.run([str(tmp_path / "image.png")], str(tmp_path / "out.npz"), predictor)
    backbone = predictor.task.model.backbone
    pooled = backbone.apply({"params": params["backbone"]}, inputs[:1]).pooled
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["features"], pooled, atol=1e-5)


@pytest.mark.parametrize("alone", [False, True])
def test_what_the_optimizer_averages_is_what_others_get(tiny_config, tmp_path, alone):
    """Of a Schedule-Free run, `predict` and `convert` read x, not the y of training."""
    config = tiny_config(ema_decay=0.0, optim__name="schedule_free_adamw")
    config.optim.freeze = ["head/bias"]

    def state(params):
        optimizer = optim.build(config.optim, params, duration=Duration(9, 1, 1))
        state = optimizer.init(params)["schedule_free_adamw"]
        z = jax.tree.map(lambda x: x + 1, state.z)
        return {"schedule_free_adamw": state._replace(z=z)}

    params = left_by_a_run(config, tmp_path, np.uint8, state)
    expected = jax.tree.map(lambda y: y - 1 / 9, params)  # y = 0.9 x + 0.1 z
    expected["head"]["bias"] = params["head"]["bias"]
    predictor = Predictor.from_workdir(str(tmp_path))
    if alone:
        (tmp_path / "config.json").unlink()
    else:
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), predictor.params, expected)
    loaded = checkpoints.load(tmp_path / "checkpoints", predictor.task.model)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), loaded, expected)


def test_a_range_that_nothing_tells_is_an_error(tiny_config, tmp_path):
    left_by_a_run(tiny_config(ema_decay=0.0), tmp_path, np.float32)
    with pytest.raises(UserError, match=r"learned from float32 images, and config\.data\.pp=''"):
        Predictor.from_workdir(str(tmp_path))
