"""The package as a library: what `import vit_jax` offers."""

import functools
import json
import logging
import random
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

import vit_jax
from vit_jax.checkpoints.store import Store, flatten
from vit_jax.errors import UserError
from vit_jax.inference.preparation import as_pictures
from vit_jax.parallel import sharding
from vit_jax.tracking import read_metrics
from vit_jax.tracking.callbacks import Callbacks
from vit_jax.training.outcome import Outcome
from vit_jax.training.run import Run
from vit_jax.types import ArraySpec, DataInfo, Features

RGB = DataInfo(
    {
        "image": ArraySpec((8, 8, 3), np.dtype("uint8")),
        "label": ArraySpec((), np.dtype("int32")),
    },
    num_classes=2,
)


class Plain(nn.Module):
    """A module as anyone writes it: its parameters name no logical axes."""

    width: int = 8

    @nn.compact
    def __call__(self, images, *, train=False):
        grid = nn.relu(nn.Conv(self.width, (4, 4), strides=4)(images))
        return Features(grid=grid, pooled=grid.mean((1, 2)))


class Notes:
    """A callback that notes what it is told."""

    def __init__(self):
        self.told = []

    def on_step(self, step, metrics):
        self.told.append(("step", step, metrics["train/loss"]))

    def on_evaluate(self, step, metrics):
        self.told.append(("evaluate", step, metrics["val/accuracy"]))

    def on_save(self, step):
        self.told.append(("save", step))

    def on_end(self, outcome):
        self.told.append(("end", outcome))


class Vandal:
    """A callback that changes what it gets, and the state of all global random numbers."""

    def on_step(self, step, metrics):
        metrics.clear()
        random.seed(step)
        np.random.seed(step)  # noqa: NPY002

    def on_evaluate(self, step, metrics):
        metrics.update(dict.fromkeys(metrics, 0.0))

    def on_save(self, step):
        np.random.seed(step)  # noqa: NPY002


def config_of(digits_npz):
    """The config of a run of a plain module."""
    config = vit_jax.config.load(f"tests/tiny.py:{digits_npz}")
    config.total, config.ema_decay, config.accum_steps = 4, 0.0, 1
    config.mesh.zero1 = True
    config.model = {"name": f"{__name__}:Plain", "width": 4}
    config.task = {"name": "classification"}
    return config


@pytest.fixture(scope="module")
def trained(digits_npz, tmp_path_factory):
    """(notes, outcome, workdir, log records) of a run of a plain module, trained from Python."""
    config = config_of(digits_npz)
    workdir = str(tmp_path_factory.mktemp("run"))
    notes, records = Notes(), []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("vit_jax.training.run").addHandler(handler)
    everything = {**config.to_dict(), "batch_size": np.int64(config.batch_size)}
    outcome = vit_jax.train(everything, Path(workdir), callbacks=(one for one in [Vandal(), notes]))
    logging.getLogger("vit_jax.training.run").removeHandler(handler)
    return notes, outcome, workdir, records


def test_a_plain_module_trains_with_one_line_of_warning(trained):
    _, outcome, _, records = trained
    assert isinstance(outcome, Outcome)
    (record,) = records
    line = record.getMessage()
    assert "parameters name no logical axes (backbone/Conv_0/bias, ...)" in line
    assert "8 devices holds all of them" in line
    assert "\n" not in line


@pytest.fixture
def my_models(tmp_path, monkeypatch):
    """The module of the example of NNX in the docs, and a module with a batch norm."""
    text = (Path(__file__).parents[1] / "docs/extending.md").read_text()
    (code,) = re.findall(r"```python\n(# my_models\.py.*?)```", text, re.DOTALL)
    batch_norm = (
        "class Normed(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, images, *, train=False):\n"
        "        grid = nn.BatchNorm(use_running_average=not train)(images)\n"
        "        return Features(grid=grid, pooled=grid.mean((1, 2)))\n"
    )
    (tmp_path / "my_models.py").write_text(code + batch_norm)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_models", None)


def test_an_nnx_module_is_used_through_the_bridge(my_models):
    config = {"name": "my_models:Net", "width": 4}
    task = vit_jax.tasks.build({"name": "classification"}, config, RGB)
    boxed = task.init(jax.random.key(0))
    assert sharding.unnamed({"backbone": boxed["backbone"]}) == [
        "backbone/inner/embed/bias",
        "backbone/inner/embed/kernel",
    ]
    params, images = nn.unbox(boxed)["backbone"], np.ones((2, 8, 8, 3), np.float32)

    def pooled(params, **options):
        return task.model.backbone.apply({"params": params}, images, **options).pooled

    found = pooled(params)
    keys = [{"dropout": jax.random.key(number)} for number in range(2)]
    first, second = (pooled(params, train=True, rngs=rngs) for rngs in keys)
    assert (first != second).any()
    assert (pooled(jax.tree.map(lambda x: 2 * x, params)) != found).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_models:Patches", r"is no model; a Flax NNX module needs a Linen module .*to_linen"),
        ("my_models:Normed", r"besides its parameters \(batch_stats\), which no run keeps"),
    ],
)
def test_a_module_that_cannot_be_trained_is_refused_in_one_line(my_models, name, message):
    with pytest.raises(UserError, match=message):
        vit_jax.tasks.build({"name": "classification"}, {"name": name}, RGB).init(jax.random.key(0))


def test_callbacks_are_told_of_steps_evaluations_saves_and_the_end(trained):
    notes, outcome, *_ = trained
    assert [entry[1] for entry in notes.told if entry[0] == "step"] == [1, 2, 3, 4]
    assert [entry[1] for entry in notes.told if entry[0] == "save"] == [3, 4]
    found = [entry for entry in notes.told if entry[0] == "evaluate"]
    assert found == [("evaluate", 4, outcome.results["val/accuracy"])]
    assert notes.told[-1] == ("end", outcome)
    assert all(isinstance(entry[2], float) for entry in notes.told if entry[0] == "step")


def test_a_run_without_callbacks_computes_the_same_bits(trained, digits_npz, tmp_path):
    _, outcome, workdir, _ = trained
    config = config_of(digits_npz)
    assert vit_jax.train(config, tmp_path).results == outcome.results
    abstract = Run.build(config).abstract
    without, told = (
        flatten(Store(Path(path) / "checkpoints").restore(4, abstract).tree)
        for path in (tmp_path, workdir)
    )
    assert without.keys() == told.keys()
    for name, leaf in without.items():
        assert np.asarray(leaf).tobytes() == np.asarray(told[name]).tobytes(), name
    kinds = "train/loss", "train/grad_norm", "eval/val/loss"
    rows = [
        [[row.get(kind) for kind in kinds] for row in read_metrics(epath.Path(path))]
        for path in (tmp_path, workdir)
    ]
    assert rows[0] == rows[1]
    assert None not in rows[0][0][:2]


def test_what_a_callback_changes_in_its_metrics_reaches_nobody():
    told = []
    vandal = type("Vandal", (), {"on_step": lambda self, step, metrics: metrics.clear()})()
    other = type("Other", (), {"on_step": lambda self, step, metrics: told.append(metrics)})()
    row = {"train/loss": 1.0}
    Callbacks([vandal, other])("on_step", 3, row)
    assert told == [row] == [{"train/loss": 1.0}]


def test_a_run_is_evaluated_and_used_from_python(trained):
    _, outcome, workdir, _ = trained
    assert vit_jax.evaluate(Path(workdir), overrides={"log.every": 2}) == outcome.results
    images = np.zeros((3, 8, 8, 1), np.uint8)
    assert vit_jax.features(Path(workdir), (jax.numpy.asarray(x) for x in images)).shape == (3, 4)
    with pytest.raises(UserError, match=r"no step bst; it has \[3, 4\]"):
        vit_jax.evaluate(workdir, step="bst")


def test_a_run_that_python_code_started_records_no_command(trained):
    """The arguments of this process are those of pytest, or of a notebook's kernel."""
    assert json.loads((Path(trained[2]) / "config.json").read_text())["command"] == []


def test_numbers_of_numpy_are_stored_as_numbers():
    config = vit_jax.config.load("digits", {"total": np.int64(5), "batch_size": "32"})
    config.model.width = np.int64(64)
    stored = json.loads(json.dumps(vit_jax.config.validate(config).to_dict(), default=str))
    assert (stored["total"], stored["batch_size"], stored["model"]["width"]) == (5, 32, 64)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.jpg", ["a.jpg"]),
        (Path("a.jpg"), [Path("a.jpg")]),
        ((name for name in "ab"), ["a", "b"]),
        ({"a.jpg"}, ["a.jpg"]),
        ((), []),
    ],
)
def test_images_may_be_one_file_or_any_collection(given, expected):
    assert as_pictures(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "images=None: write a list of image files"),
        (np.array("a.jpg"), "write a list of image files"),
        ({"a": "b.jpg"}, "images={'a': 'b.jpg'}: write a list"),
        (Image.new("L", (2, 2)), "images=<PIL.* write a list"),
        ([Image.new("L", (2, 2))], r"images\[0\] is an image of Pillow: give its file, or np"),
        (["a.jpg", 3], r"images\[1\]=3: write an image file or uint8 pixels"),
        ([b"\xff\xd8"], r"images\[0\]=b'.*: write an image file"),
    ],
)
def test_what_are_no_images_is_one_line(given, message):
    with pytest.raises(UserError, match=message):
        as_pictures(given)


NO_PATH = "write a path, as a text or an object of pathlib"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vit_jax.train(None, "run"), "config=None: write a section with the keys seed"),
        (
            lambda: vit_jax.train({"seed": 1}, "run"),
            "total is missing; start from .*default_config",
        ),
        (lambda: vit_jax.train("digits", None), f"workdir=None: {NO_PATH}"),
        (lambda: vit_jax.train("digits", ""), "the workdir has no name"),
        (lambda: vit_jax.train("digits", "run", callbacks=print), "callbacks=.*: write a list"),
        (lambda: vit_jax.train("digits", "run", profile=3), "^profile=3: write START:STOP"),
        (lambda: vit_jax.evaluate(3), f"workdir=3: {NO_PATH}"),
        (lambda: vit_jax.evaluate("run", overrides=["seed=1"]), "overrides=.*: write values"),
        (lambda: vit_jax.features(None, ["a.jpg"]), f"model=None: {NO_PATH}"),
        (lambda: vit_jax.export(3, "out"), f"model=3: {NO_PATH}"),
        (lambda: vit_jax.config.load({}), f"config={{}}: {NO_PATH}"),
        (lambda: vit_jax.list_models(None), "pattern=None: write a text"),
        (lambda: vit_jax.build("vit_ti16", num_classes=-1), "num_classes=-1: write a positive"),
    ],
)
def test_a_wrong_argument_is_one_line(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (type("Typo", (), {"on_steps": print})(), "on_steps is no event; did you mean 'on_step'"),
        (print, "has none of the methods on_step, on_evaluate, on_save, on_end"),
    ],
)
def test_a_callback_that_would_never_be_called_is_an_error(callback, message):
    with pytest.raises(UserError, match=message):
        vit_jax.train("never read", "/nowhere", callbacks=[callback])


def test_evaluate_needs_one_model():
    with pytest.raises(UserError, match="give workdir, or config and checkpoint"):
        vit_jax.evaluate()
    with pytest.raises(UserError, match="checkpoint needs config"):
        vit_jax.evaluate(checkpoint="B_16.npz")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 0}, "step does not go with checkpoint; give workdir"),
        ({"overrides": {"seed": 1}}, "overrides does not go with checkpoint; change config"),
        ({"trust": ["mine:Task"]}, "trust does not go with checkpoint; the code that config"),
        ({"workdir": "run", "checkpoint": ""}, "config does not go with workdir; change keys"),
    ],
)
def test_evaluate_refuses_an_argument_that_its_model_would_not_use(given, message):
    with pytest.raises(UserError, match=message):
        vit_jax.evaluate(**{"config": "digits", "checkpoint": "B_16.npz", **given})


def test_models_are_listed_by_pattern():
    assert vit_jax.list_models("vit_s1?") == ["vit_s14", "vit_s16"]
    assert vit_jax.list_models("no such") == []
    assert set(vit_jax.list_models()) == set(vit_jax.models.names())
    assert vit_jax.list_models("test_vit.r*", pretrained=True) == ["timm/test_vit.r160_in1k"]
    assert "facebook/dinov2-small" in vit_jax.list_models("dinov2", pretrained=True)


def test_a_model_is_built_with_its_published_weights(hub_server):
    folder = Path(__file__).parent / "golden/hf_tiny/dinov2"
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    hub_server.repos["facebook/dinov2-base"] = contents
    fields = {k: v for k, v in vit_jax.checkpoints.model_config(folder).items() if k != "name"}
    build = functools.partial(vit_jax.build, "facebook/dinov2-base", **fields)
    model, params = build(pretrained=True)
    assert model == build()
    expected = vit_jax.checkpoints.load(folder, model)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    classifier, params = build(pretrained=str(folder), num_classes=3, image_size=28)
    assert params["head"]["kernel"].shape[1] == 3
    images = np.zeros((1, 28, 28, 3), np.float32)
    assert not classifier.apply({"params": params}, images).any()
    for size in (0, "28", True, (28, 28, 3), (28, True), [28, [28, 28]]):
        with pytest.raises(UserError, match=r"image_size=.*: write a side in pixels, or"):
            vit_jax.checkpoints.load(folder, model, image_size=size)
    vit_jax.checkpoints.load(folder, model, image_size=np.int64(28))


def test_weights_that_nobody_published_are_refused():
    with pytest.raises(UserError, match="no published weights are known for 'vit_g14'"):
        vit_jax.build("vit_g14", pretrained=True)
    with pytest.raises(UserError, match="so it needs pretrained"):
        vit_jax.build("vit_b16", image_size=384)


def test_every_public_name_is_there_and_documented():
    assert dir(vit_jax) == sorted(vit_jax.__all__)
    for name in vit_jax.__all__:
        assert getattr(vit_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = vit_jax.trian
