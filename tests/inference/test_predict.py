"""`predict` on checkpoints and on runs: every pooling, images that are not square, pictures."""

from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import checkpoints, models, optim
from vit_jax.__main__ import main
from vit_jax.config.durations import Duration
from vit_jax.inference import predict
from vit_jax.inference.predict import Predictor

BASE = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "num_classes": 3}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture of another size and shape than the model reads."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def saved(path, **fields):
    """Parameters for images of 12 by 12 pixels and a head of zeros, as our own checkpoint."""
    model = models.build("vit", **BASE, **fields)
    images = np.zeros((1, 12, 12, 3), np.float32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: draw(0, 0.3, x.shape).astype(np.float32), shapes)
    params = {**params, "head": jax.tree.map(np.zeros_like, params["head"])}
    checkpoints.save(params, model, path, "orbax")


@pytest.mark.parametrize(
    "fields",
    [
        {"pooling": "token", "num_registers": 2},
        pytest.param({"pooling": "mean"}, marks=pytest.mark.soak),
        {"pooling": "map"},
    ],
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
        Predictor(task, params, None, None).draw_patches(np.zeros((8, 8, 3), np.uint8), "x.png")
        assert drawn.pop() == patch


@pytest.mark.parametrize("size", ["x", "8x", "0", "-8", "8x8x3", "wide"])
def test_sizes_that_are_none(capsys, photo, size):
    code = main(["predict", "--checkpoint=c.npz", f"--image-size={size}", photo])
    message = capsys.readouterr().err
    assert code == 2
    assert f"{size!r} is no size; write 224, or 192x256" in message


@pytest.mark.parametrize("alone", [False, True])
def test_what_the_optimizer_averages_is_what_others_get(
    tiny_config, left_by_a_run, tmp_path, alone
):
    """`predict` and `convert` read x of a Schedule-Free run, not the y of training."""
    config = tiny_config(ema_decay=0.0, optim__name="schedule_free_adamw")
    config.optim.freeze = ["head/bias"]

    def state(params):
        optimizer = optim.build(config.optim, params, duration=Duration(9, 1, 1))
        state = optimizer.init(params)["schedule_free_adamw"]
        z = jax.tree.map(lambda x: x + 1, state.z)
        return {"schedule_free_adamw": state._replace(z=z)}

    params = left_by_a_run(config, tmp_path, state=state)
    expected = jax.tree.map(lambda y: y - 1 / 9, params)  # y = 0.9 x + 0.1 z
    expected["head"]["bias"] = params["head"]["bias"]
    predictor = Predictor.from_workdir(str(tmp_path))
    if alone:
        (tmp_path / "config.json").unlink()
    else:
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), predictor.params, expected)
    loaded = checkpoints.load(tmp_path / "checkpoints", predictor.task.model)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), loaded, expected)
