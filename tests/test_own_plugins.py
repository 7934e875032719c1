"""Plug-ins from one file outside the package: trained with, used again, and never run unasked."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax import plugins
from vit_jax.__main__ import main
from vit_jax.config import validate
from vit_jax.data import ops
from vit_jax.errors import UserError
from vit_jax.inference.predict import Predictor
from vit_jax.optim.rule import RULES
from vit_jax.training.loop import train
from vit_jax.training.workdir import Workdir

HERE = Path(__file__).parent
OWN = {
    "model.name": "own_plugins:Pooled",
    "task.name": "own_plugins:Task",
    "optim.name": "own_plugins:sign_descent",
    "optim.schedule.name": "own_plugins:square_root",
    "data.source": "own_plugins:Stripes",
}
NAMES = [*OWN.values(), "own_plugins:negative"]
TRUST = f"--trust={','.join(NAMES)}"


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def new_process(monkeypatch):
    """Nothing has been named yet, as in the process of another command."""
    monkeypatch.setattr(plugins, "_trusted", set())


@pytest.fixture
def no_import(new_process, monkeypatch):
    monkeypatch.setattr(plugins, "_import", lambda *_: pytest.fail("code was imported"))


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A finished run of plug-ins alone; the config file that it was started from is gone."""
    folder = tmp_path_factory.mktemp("own")
    config = folder / "config.py"
    config.write_text(
        "from vit_jax.config import default_config\n"
        "def get_config(arg):\n"
        "    config = default_config()\n"
        "    config.model = {'name': 'own_plugins:Pooled', 'width': 4}\n"
        "    config.task.name = 'own_plugins:Task'\n"
        "    config.data.source, config.data.name = 'own_plugins:Stripes', ''\n"
        "    config.total, config.batch_size, config.ema_decay = 6, 16, 0.0\n"
        "    config.log.tensorboard = config.log.pictures = False\n"
        "    config.compilation_cache = ''\n"
        "    return config\n"
    )
    overrides = {
        "optim.name": "own_plugins:sign_descent",
        "optim.args.momentum": "0.5",
        "optim.schedule.name": "own_plugins:square_root",
        "optim.schedule.end": "0.1",
        "data.pp": "own_plugins:negative(white=255)|flip_lr",
        "data.eval_pp": "own_plugins:negative()",
    }
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        assert main(["train", f"--config={config}", f"--workdir={folder}/run", *flags]) == 0
        # Resuming a run that is done, with the user's own config file, needs nothing more.
        assert main(["train", f"--config={config}", f"--workdir={folder}/run", *flags]) == 0
    config.unlink()
    return folder / "run"


def test_one_file_holds_one_plug_in_of_each_kind(own_run):
    config = json.loads((own_run / "config.json").read_text())["config"]
    assert config["optim"]["name"] == "own_plugins:sign_descent"
    rows = [json.loads(line) for line in (own_run / "metrics.jsonl").read_text().splitlines()]
    rates = [row["train/lr"] for row in rows if "train/lr" in row]
    assert rates[0] == pytest.approx(1e-3)
    assert min(rates) < 0.9e-3


@pytest.mark.parametrize("command", ["evaluate", "fewshot", "predict", "features", "convert"])
def test_a_workdir_runs_its_plug_ins_if_they_are_trusted(command, own_run, tmp_path, new_process):
    assert main([*command_line(command, own_run, tmp_path), TRUST]) == 0


@pytest.mark.parametrize("command", ["evaluate", "fewshot", "predict", "features", "convert"])
def test_a_workdir_runs_no_code_that_was_not_named(command, own_run, tmp_path, no_import, capsys):
    assert main(command_line(command, own_run, tmp_path)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{own_run}/config.json names code from outside this package" in line
    assert "config.optim.name=own_plugins:sign_descent" in line
    assert "write --trust=own_plugins:" in line


def test_a_report_imports_nothing(own_run, no_import):
    assert main(["report", f"--workdir={own_run}"]) == 0


def test_all_names_are_needed(own_run, tmp_path, new_process, capsys):
    argv = command_line("predict", own_run, tmp_path)
    assert main([*argv, f"--trust={','.join(NAMES[1:])}"]) == 2
    assert capsys.readouterr().err.strip().endswith("write --trust=own_plugins:Pooled")


def test_what_an_override_names_is_trusted(own_run, new_process):
    workdir = Workdir.existing(str(own_run))
    overrides = {"data.pp": "own_plugins:negative()", **OWN}
    assert workdir.read_config(overrides).model.name == "own_plugins:Pooled"


def test_what_an_override_replaces_needs_no_trust(own_run, new_process):
    ours = {
        "model.name": "vit_ti16",
        "task.name": "classification",
        "optim.name": "adamw",
        "optim.schedule.name": "cosine",
        "data.source": "fake",
        "data.pp": "",
        "data.eval_pp": "",
    }
    workdir = Workdir.existing(str(own_run))
    for key in ours:
        rest = {other: text for other, text in ours.items() if other != key}
        with pytest.raises(UserError, match=rf"config\.{key}="):
            workdir.read_config(rest)
    assert workdir.read_config(ours).optim.name == "adamw"


def test_python_names_what_it_trusts(own_run, new_process):
    with pytest.raises(UserError, match="write --trust="):
        Predictor.from_workdir(str(own_run))
    predictor = Predictor.from_workdir(str(own_run), trust=NAMES)
    images = np.zeros((1, 8, 8, 3), np.uint8)
    assert predictor.predict(images)["probability"].shape == (1, 2)


def test_what_python_trained_with_is_trusted(tiny_config, tmp_path, new_process):
    config = tiny_config(total=2)
    config.unlock()
    config.optim.name = "own_plugins:sign_descent"
    train(validate(config), str(tmp_path))
    assert Workdir.existing(str(tmp_path)).read_config().optim.name == config.optim.name


def test_starting_from_a_run_imports_no_code_of_it(own_run, tmp_path, no_import, capsys):
    argv = ["train", f"--config={HERE / 'tiny.py'}:x.npz", f"--workdir={tmp_path}/new"]
    keys = {"init.checkpoint": str(own_run), "data.source": "fake", "data.name": ""}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    assert main([*argv, *flags]) == 2
    assert "config.optim.name=own_plugins:sign_descent" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["task", "model", "optim", "eval", "data", "log"])
def test_code_is_seen_wherever_a_config_may_hide_it(own_run, tmp_path, new_process, place):
    hidden = {
        "task": {"name": "classification", "distill": {"model": {"name": "os:system"}}},
        "model": {"name": "two_towers", "text": [{"name": "os:system"}]},
        "optim": {"group_schedules": [["head/.*", {"name": "os:system"}]]},
        "eval": {"sets": {"val": {"pp": "decode|os:system('touch x')"}}},
        "data": {"args": {"reader": "os:system"}},
        "log": {"writers": ["jsonl", "os:system"]},
    }
    stored = {"version": 1, "config": {place: hidden[place]}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=rf"config\.{place}\..*=os:system.*--trust=os:system"):
        Workdir.existing(str(tmp_path)).read_config()


def test_names_of_data_and_regexes_are_no_code(tmp_path, new_process):
    config = {
        "data": {"name": "mnist:three", "dir": "x:y", "split": "a:b"},
        "init": {"checkpoint": "runs:today/a"},
        "eval": {"sets": {"val": {"name": "voc:four"}}, "probes": {"split": "x:y", "dir": "a:b"}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"version": 1, "config": config}))
    assert Workdir.existing(str(tmp_path)).read_config().data.name == "mnist:three"


def test_an_op_of_the_same_name_as_ours_replaces_none(found):
    before = ops.find_op("resize").function
    assert ops.find_op("own_plugins:negative").kind == "image"
    assert ops.find_op("resize").function is before
    with pytest.raises(UserError, match=r"is no preprocessing op \(it lacks op_kind"):
        ops.find_op("own_plugins:square_root")


def test_modules_of_the_current_folder_are_found(tmp_path, monkeypatch):
    """The installed command does not put that folder on Python's path, `python -m` does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "just_here.py").write_text("import optax\nsteps = optax.scale_by_sign\n")
    assert RULES.find("just_here:steps", "config.optim.name")


def command_line(command, workdir, folder):
    """A command of a workdir, with what else it needs."""
    image = folder / "stripes.png"
    Image.fromarray(np.tile(np.uint8([[0], [255]]), (4, 8))).save(image)
    return {
        "evaluate": ["evaluate", f"--workdir={workdir}"],
        "fewshot": ["fewshot", f"--workdir={workdir}"],
        "predict": ["predict", f"--workdir={workdir}", str(image)],
        "features": ["features", f"--workdir={workdir}", str(image), f"--out={folder}/f.npz"],
        "convert": ["convert", str(workdir), f"{folder}/c", "--to=orbax"],
    }[command]
