"""`predict` on checkpoints: every pooling, images that are not square, the pictures."""

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import checkpoints, models
from vit_jax.__main__ import main

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


@pytest.mark.parametrize("size", ["x", "8x", "0", "-8", "8x8x3", "wide"])
def test_sizes_that_are_none(capsys, photo, size):
    code = main(["predict", "--checkpoint=c.npz", f"--image-size={size}", photo])
    message = capsys.readouterr().err
    assert code == 2
    assert f"{size!r} is no size; write 224, or 192x256" in message
