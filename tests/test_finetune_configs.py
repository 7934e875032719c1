"""The published fine-tuning configs, through the commands, on data made here."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vit_jax import checkpoints, convert, models
from vit_jax.__main__ import main
from vit_jax.config import load
from vit_jax.data import eval_batches, open_source
from vit_jax.report import read_metrics


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    from vit_jax.data.prepare import prepare

    folder = str(tmp_path_factory.mktemp("tfds"))
    prepare("digits_low", folder)
    prepare("digits_high", folder)
    return folder


@pytest.mark.parametrize(("half", "classes"), [("low", range(5)), ("high", range(5, 10))])
@pytest.mark.parametrize(("split", "rows"), [("train", slice(1437)), ("test", slice(1437, None))])
def test_halves_of_the_digits_are_relabelled(data_dir, half, classes, split, rows):
    digits = load_digits()
    images, labels = digits.images[rows], digits.target[rows]
    wanted = np.isin(labels, classes)
    spec = {"source": "tfds", "name": f"digits_{half}", "dir": data_dir, "split": split}
    source = open_source(spec)
    assert source.class_names == tuple(map(str, classes))
    (batch,) = eval_batches(source, batch_size=800, rows=np.arange(800), pp="decode(1)")
    real = batch["mask"] > 0
    np.testing.assert_array_equal(batch["label"][real], labels[wanted] - classes[0])
    pixels = np.round(images[wanted] * (255 / 16)).astype(np.uint8)
    np.testing.assert_array_equal(batch["image"][real][..., 0], pixels)


def test_digits_transfer_through_the_commands(root, data_dir, tmp_path, capsys):
    """Train, convert to the published names, fine-tune at twice the size."""

    def train(arguments, workdir):
        config = f"--config={root}/configs/digits_transfer.py:{arguments}"
        keys = ("total=1", "model.depth=1", f"data.dir={data_dir}", "log.pictures=false")
        overrides = [f"--config.{key}" for key in (*keys, "optim.schedule.warmup=0")]
        assert main(["train", config, f"--workdir={workdir}", *overrides]) == 0

    train("", tmp_path / "low")
    convert.run(str(tmp_path / "low"), str(tmp_path / "low.npz"), "npz")
    train(f"high,checkpoint={tmp_path}/low.npz", tmp_path / "high")
    shown = capsys.readouterr().err
    assert "resized: backbone/pos_embed: 4x4 to 8x8" in shown
    assert "initialised: head/kernel: zeros" in shown
    assert read_metrics(tmp_path / "high")[-1]["eval/test/num_examples"] == 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of PNG files."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in ("bright", "dark"):
        (root / name).mkdir()
        for number in range(12):
            pixels = random.integers(0, 128, (40, 36, 3)) + 127 * (name == "bright")
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def given(folder, released):
    return f"dataset={folder},checkpoint={released}"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file as published, of the smallest named model with a head of 1,000 classes."""
    model = models.build("vit_mu16", num_classes=1000)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp("released") / "mu16.npz"
    checkpoints.save(params, model, path, "npz")
    return path


@pytest.mark.parametrize("config", ["finetune.py", "linear_probe.py"])
def test_configs_run_on_a_folder_from_a_checkpoint(given, config, root, tmp_path, capsys):
    config = f"{root}/configs/{config}:model=vit_mu16,{given},runlocal"
    command = ["train", f"--config={config},split=train[:75%],test=train[75%:]"]
    assert main([*command, f"--workdir={tmp_path}", "--config.log.pictures=false"]) == 0
    assert "resized: backbone/pos_embed: 4x4 to 2x2" in capsys.readouterr().err
    last = read_metrics(tmp_path)[-1]
    assert last["eval/test/num_examples"] == 6
    assert np.isfinite(last["train/loss"])


@pytest.mark.parametrize(
    ("arguments", "total", "split"),
    [
        ("dataset=cifar100", 10_000, "train[:98%]"),
        ("dataset=imagenet2012,model=vit_l16", 20_000, "train[:99%]"),
        ("dataset=oxford_iiit_pet", 500, "train"),
        ("dataset=caltech101,vtab", 2_500, "train[:1000]"),
        ("dataset=cifar10,split=train[:50%]", 10_000, "train[:50%]"),
    ],
)
def test_presets_of_the_paper(root, arguments, total, split):
    config = load(f"{root}/configs/finetune.py:{arguments}")
    assert (config.total, config.data.split) == (total, split)
    assert (config.batch_size, config.optim.args.momentum_dtype) == (512, "bfloat16")
    assert "lora" not in config.task
    assert load(f"{root}/configs/finetune.py:{arguments},lora=4").task.lora.rank == 4
