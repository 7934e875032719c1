"""The published fine-tuning configs, through the commands, on data made here."""

import importlib.util
import json
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vit_jax import checkpoints, models, tasks
from vit_jax.__main__ import main
from vit_jax.checkpoints import input_spec
from vit_jax.config import load
from vit_jax.data import element_spec, eval_batches, open_source
from vit_jax.data.sources._splits import split_range
from vit_jax.errors import UserError
from vit_jax.tracking import read_metrics
from vit_jax.training.run import Run
from vit_jax.types import DataInfo


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
    (batch,) = eval_batches(source, batch_size=800, rows=np.arange(800))
    real = batch["mask"] > 0
    np.testing.assert_array_equal(batch["label"][real], labels[wanted] - classes[0])
    pixels = np.round(images[wanted] * (255 / 16)).astype(np.uint8)
    np.testing.assert_array_equal(batch["image"][real][..., 0], pixels)


@pytest.mark.usefixtures("one_device")
def test_digits_transfer_through_the_commands(root, data_dir, tmp_path, capsys):
    """From what the first config trains, under the published names, to twice the size."""
    overrides = {
        "total": "1",
        "model.depth": "1",
        "data.dir": data_dir,
        "log.pictures": "false",
        "optim.schedule.warmup": "0",
    }
    low = Run.build(load(f"{root}/configs/digits_transfer.py", overrides))
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: np.float32(draw(0, 0.1, x.shape)), low.abstract.params)
    checkpoints.save(params, low.task.model, tmp_path / "low.npz", "npz")
    high = f"--config={root}/configs/digits_transfer.py:high,checkpoint={tmp_path}/low.npz"
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    assert main(["train", high, f"--workdir={tmp_path}/high", *flags]) == 0
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


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "config", ["finetune.py", pytest.param("linear_probe.py", marks=pytest.mark.soak)]
)
def test_configs_run_on_a_folder_from_a_checkpoint(given, config, root, tmp_path, capsys):
    config = f"{root}/configs/{config}:model=vit_mu16,{given},runlocal"
    command = ["train", f"--config={config},split=train[:75%],test=train[75%:]"]
    assert main([*command, f"--workdir={tmp_path}", "--config.log.pictures=false"]) == 0
    assert "resized: backbone/pos_embed: 4x4 to 2x2" in capsys.readouterr().err
    last = read_metrics(tmp_path)[-1]
    assert last["eval/test/num_examples"] == 6
    assert np.isfinite(last["train/loss"])


# Dosovitskiy et al. 2021, table 4: steps, and the learning rates that were tried.
SGD = (0.001, 0.003, 0.01, 0.03)
PAPER = {
    "imagenet2012": (20_000, (0.003, 0.01, 0.03, 0.06)),
    "cifar100": (10_000, SGD),
    "cifar10": (10_000, SGD),
    "oxford_iiit_pet": (500, SGD),
    "oxford_flowers102": (500, SGD),
}
VTAB = (2_500, (0.01,))


def presets(root):
    """The module of the config, for its tables."""
    spec = importlib.util.spec_from_file_location("finetune", f"{root}/configs/finetune.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_presets_are_the_paper_s(root):
    module = presets(root)
    assert module.PRESETS.keys() == PAPER.keys()
    rows = {**PAPER, **{f"{name},vtab": VTAB for name in module.VTAB}}
    for name, (steps, rates) in rows.items():
        config = load(f"{root}/configs/finetune.py:dataset={name}")
        assert (config.total, config.batch_size, config.optim.clip_norm) == (steps, 512, 1.0)
        assert config.optim.lr in rates
        assert (config.optim.schedule.name, config.optim.weight_decay) == ("cosine", 0)
        assert config.optim.args.momentum_dtype == "bfloat16"
        assert "lora" not in config.task
        assert load(f"{root}/configs/finetune.py:dataset={name},lora=4").task.lora.rank == 4


def test_vtab_takes_a_thousand_examples_and_800_to_choose_by(root):
    for name, preset in presets(root).VTAB.items():
        final = load(f"{root}/configs/finetune.py:dataset={name},vtab").data
        choice = load(f"{root}/configs/finetune.py:dataset={name},vtab,dev")
        held_out = choice.eval.sets.dev.split
        assert final.split == f"{choice.data.split}+{held_out}"
        lengths = [split_range(part, 100_000) for part in final.split.split("+")]
        assert [len(part) for part in lengths] == [800, 200]
        if held_out.startswith("train"):
            assert lengths[0].stop <= lengths[1].start
            test = split_range(preset.test, 100_000) if preset.test.startswith("train") else None
            assert test is None or lengths[1].stop <= test.start
        assert "flip" not in final.pp
        assert "crop" not in final.pp


def test_every_preset_makes_a_model_of_its_images(root):
    """From encoded images to logits, by shape alone, at the paper's 384 pixels."""
    fields = {"num_examples": 8, "num_classes": 7, "encoded": True}
    source = open_source({"source": "fake", "name": "fake", "split": "train", **fields})
    module = presets(root)
    programs = {}
    for name in [*module.PRESETS, *(f"{task},vtab" for task in module.VTAB)]:
        for extra in ("", ",dev"):
            config = load(f"{root}/configs/finetune.py:dataset={name}{extra}")
            programs.setdefault((config.data.pp, config.data.eval_pp), config)
    assert len(programs) == 2  # all others read and see the same
    for (pp, eval_pp), config in programs.items():
        spec = element_spec(source, pp)
        assert spec == element_spec(source, eval_pp)
        assert spec["image"].shape == (384, 384, 3)
        task = tasks.build(config.task, config.model, DataInfo(spec, source.num_classes))
        shapes = tasks.abstract_params(task)
        assert shapes["backbone"]["pos_embed"].shape == (1, 577, 768)
        batch = {"image": jax.ShapeDtypeStruct((4, 384, 384, 3), np.uint8)}
        assert jax.eval_shape(task.predict, shapes, batch)["probability"].shape == (4, 7)


@pytest.mark.parametrize(
    ("arguments", "splits"),
    [
        ("dataset=cifar100", ("train[:98%]", "test")),
        ("dataset=cifar100,dev", ("train[:98%]", "train[98%:]")),
        ("dataset=imagenet2012,model=vit_l16", ("train[:99%]", "validation")),
        ("dataset=oxford_iiit_pet,dev", ("train[:90%]", "train[90%:]")),
        ("dataset=svhn,vtab", ("train[:800]+train[65931:66131]", "test")),
        ("dataset=cifar10,split=train[:50%],test=test[:9]", ("train[:50%]", "test[:9]")),
        ("dataset=stl10", ("train", "test")),
    ],
)
def test_splits(root, arguments, splits):
    config = load(f"{root}/configs/finetune.py:{arguments}")
    (evaluated,) = config.eval.sets.values()
    assert (config.data.split, evaluated.split) == splits


def test_a_task_that_vtab_has_not(root):
    with pytest.raises(UserError, match="'svhnn' is no task of VTAB here; did you mean 'svhn'"):
        load(f"{root}/configs/finetune.py:dataset=svhnn,vtab")


@pytest.mark.parametrize("recipe", ["finetune", "linear_probe"])
def test_a_folder_of_the_hub_is_model_checkpoint_and_statistics(recipe, root):
    folder = f"{root}/tests/golden/hf_tiny/dinov2"
    config = load(f"{root}/configs/{recipe}.py:model={folder}")
    assert config.init.checkpoint == folder
    assert (config.model.name, config.model.width, config.model.activation) == ("vit", 32, "gelu")
    assert config.task.mean == pytest.approx([123.675, 116.28, 103.53])
    # A checkpoint of one's own goes before the files that the hub has under this name.
    named = load(f"{root}/configs/{recipe}.py:model=facebook/dinov2-base,checkpoint={folder}")
    assert named.init.checkpoint == folder


def test_a_probe_needs_a_trained_backbone(root, monkeypatch):
    monkeypatch.setattr(input_spec, "read", lambda _: None)  # It would ask the hub.
    config = load(f"{root}/configs/linear_probe.py:model=facebook/dinov2-base")
    assert config.init.checkpoint == "hf://facebook/dinov2-base"
    with pytest.raises(UserError, match="argument checkpoint is missing: a probe measures a train"):
        load(f"{root}/configs/linear_probe.py:model=vit_b16")
    assert load(f"{root}/configs/linear_probe.py:runlocal").model.depth == 2


@pytest.mark.parametrize(
    "recipe", ["augreg", "finetune", "linear_probe", "lit_coco", "segment_ade20k"]
)
def test_the_pooling_of_the_run_that_is_fine_tuned_is_kept(recipe, root, tmp_path):
    shutil.copytree(f"{root}/tests/golden/workdir_v1", tmp_path / "run")
    told = tmp_path / "run/config.json"
    record = json.loads(told.read_text())
    record["config"]["model"] |= {"pooling": "mean", "class_token_position": False}
    told.write_text(json.dumps(record))
    for place in ("run", "run/checkpoints/4"):
        model = load(f"{root}/configs/{recipe}.py:checkpoint={tmp_path / place}").model
        assert (model.name[:4], model.pooling, model.class_token_position) == (
            "vit_",
            "mean",
            False,
        )
    # A recipe is planned before its checkpoint is there, and a file of weights tells nothing.
    (tmp_path / "B_16.npz").touch()
    for nothing in ("missing", "B_16.npz"):
        arguments = f"checkpoint={tmp_path / nothing}"
        assert "pooling" not in load(f"{root}/configs/{recipe}.py:{arguments}").model
