"""Commands give the promised output, files, exit codes and one-line errors."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from vit_jax.__main__ import main
from vit_jax.bench import machine
from vit_jax.cli import parser
from vit_jax.errors import is_out_of_memory
from vit_jax.training import initial_state

TINY = Path(__file__).parents[1] / "tiny.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_npz, drawing_reports):
    """A finished run with pictures, made by the command."""
    workdir = tmp_path_factory.mktemp("run")
    config = f"--config={TINY}:npz={digits_npz},pictures"
    with drawing_reports():
        assert main(["train", config, f"--workdir={workdir}", "--config.total=8"]) == 0
    return workdir


def fails(capsys, *argv):
    """Runs a command that must end with exit code 2 and one line; returns the line."""
    assert main(list(argv)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    return errors[0]


def test_train_ends_with_accuracy_time_and_report(trained, digits_npz, capsys):
    config = f"--config={TINY}:npz={digits_npz},pictures"
    assert main(["train", config, f"--workdir={trained}", "--config.total=8"]) == 0
    told = capsys.readouterr()
    assert f"{trained} was finished before, at step 8; nothing is trained\n" in told.err
    lines = told.out.strip().splitlines()
    assert lines[-1] == f"report: {trained}/report.html"
    assert lines[-2].startswith("training took ")
    assert lines[-3].startswith("val_ema/accuracy: ")
    words = ["train", config, f"--workdir={trained}", "--config.total=8"]
    command = json.loads((trained / "config.json").read_text())["command"]
    assert command == ["python", "-m", "vit_jax", *words]


def test_a_reader_that_has_left_ends_a_command_without_a_word(monkeypatch):
    """Such as `head`, which closes the pipe; Python would else complain of it at its end."""

    def leaves(argv):
        raise BrokenPipeError

    said = mock.Mock()
    monkeypatch.setattr(parser, "run", leaves)
    monkeypatch.setattr("sys.stderr", said)
    assert main(["models"]) == 1
    assert said.mock_calls == [mock.call.close()]


def test_report_shows_pictures_and_needs_nothing_else(trained, capsys):
    before = (trained / "report.html").read_text()
    for title in ("Confusion matrix", "The hardest mistakes", "Where the model looks"):
        assert title in before
    assert "https://" not in before.split("</head>")[0]
    (trained / "report.html").unlink()
    assert main(["report", f"--workdir={trained}"]) == 0
    assert (trained / "report.html").stat().st_size > 50_000
    assert list((trained / "report").glob("*.png"))


def test_evaluate_repeats_the_logged_metrics(trained, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    argv = ["evaluate", f"--workdir={trained}", f"--json={out}", "--config.eval.batch_size=7"]
    assert main(argv) == 0
    found = json.loads(out.read_text())
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    logged = {name[5:]: v for row in rows for name, v in row.items() if name.startswith("eval/")}
    assert found["val/num_examples"] == 30
    assert found["val/accuracy"] == logged["val/accuracy"]
    assert found["val_ema/accuracy"] == logged["val_ema/accuracy"]


def test_one_process_writes_the_metrics_whole_or_not_at_all(monkeypatch, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    out.write_text("old")
    workdir = SimpleNamespace(read_config=lambda overrides: None)
    monkeypatch.setattr("vit_jax.training.workdir.Workdir.existing", lambda path: workdir)
    monkeypatch.setattr("vit_jax.cli.commands.evaluate.set_up", lambda *_: None)
    monkeypatch.setattr(
        "vit_jax.training.evaluate.evaluate_workdir", lambda *_: {"val/accuracy": 0.5}
    )
    evaluate = ["evaluate", "--workdir=run", f"--json={out}"]
    with monkeypatch.context() as patched:
        patched.setattr(jax, "process_index", lambda: 1)
        assert main(evaluate) == 0
    assert out.read_text() == "old"
    with monkeypatch.context() as patched:
        full = OSError(errno.ENOSPC, "No space left on device", str(out))
        patched.setattr(os, "fsync", mock.Mock(side_effect=full))
        assert "No space left on device" in fails(capsys, *evaluate)
    assert out.read_text() == "old"
    assert main(evaluate) == 0
    assert json.loads(out.read_text()) == {"val/accuracy": 0.5}
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_predict_prints_classes_and_draws_attention(trained, digits_npz, tmp_path, capsys):
    image = np.load(digits_npz)["image"][0, :, :, 0]
    Image.fromarray(image).resize((80, 100)).save(tmp_path / "digit.png")
    out = tmp_path / "attention.png"
    patches = tmp_path / "patches.png"
    draw = [f"--attention={out}", f"--patches={patches}"]
    argv = ["predict", f"--workdir={trained}", "--top=3", *draw]
    assert main([*argv, str(tmp_path / "digit.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "digit.png")
    shares = [float(line.split("%")[0]) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True)
    assert Image.open(out).size[0] > 100
    assert Image.open(patches).size[0] > 100
    single = Image.open(out).size
    assert main([*argv, *2 * [str(tmp_path / "digit.png")]]) == 0
    assert Image.open(out).size != single  # several images: a panel


def test_convert_and_use_the_result(trained, digits_npz, tmp_path, capsys):
    """Out as an official file, and in again: the same probabilities, metrics and features."""
    npz = tmp_path / "model.npz"
    assert main(["convert", str(trained), str(npz), "--to=npz"]) == 0
    image = tmp_path / "digit.png"
    Image.fromarray(np.load(digits_npz)["image"][0, :, :, 0]).save(image)
    capsys.readouterr()
    assert main(["predict", f"--workdir={trained}", str(image)]) == 0
    by_run = capsys.readouterr().out
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{digit}\n" for digit in range(10)))
    argv = ["predict", f"--checkpoint={npz}", f"--labels={labels}", str(image)]
    assert main(argv) == 0
    assert capsys.readouterr().out == by_run

    config = f"--config={TINY}:{digits_npz}"
    assert main(["evaluate", config, f"--checkpoint={npz}"]) == 0
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert main(["evaluate", f"--workdir={trained}"]) == 0
    logged = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert found["val/accuracy"] == logged["val_ema/accuracy"]

    out = tmp_path / "features.npz"
    assert main(["features", str(image), f"--workdir={trained}", f"--out={out}"]) == 0
    assert np.load(out)["features"].shape == (1, 16)
    table = tmp_path / "features.parquet"
    assert main(["features", str(image), f"--checkpoint={npz}", f"--out={table}"]) == 0
    (row,) = pyarrow.parquet.read_table(table).to_pylist()
    assert row["path"] == str(image)
    np.testing.assert_allclose(row["features"], np.load(out)["features"][0], rtol=1e-4, atol=1e-5)
    argv = ["features", str(image), f"--workdir={trained}"]
    assert "written as .npz or .parquet" in fails(capsys, *argv, "--out=features.csv")
    assert "cannot write" in fails(capsys, *argv, f"--out={tmp_path}/absent/f.npz")


def test_fewshot_of_a_run(trained, capsys):
    assert main(["fewshot", f"--workdir={trained}"]) == 0
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert found
    assert all(0 <= float(value) <= 1 for value in found.values())


def test_data_draws_a_contact_sheet(digits_npz, tmp_path):
    out = tmp_path / "sheet.png"
    argv = ["data", f"--config={TINY}:{digits_npz}", f"--out={out}", "--images=20"]
    assert main(argv) == 0
    assert Image.open(out).size[0] > 500


@pytest.mark.parametrize("name", ["absent/sheet.png", ""])
def test_a_contact_sheet_that_cannot_be_written(digits_npz, tmp_path, capsys, name):
    argv = ["data", f"--config={TINY}:{digits_npz}", f"--out={tmp_path / name}", "--images=1"]
    assert main(argv) == 2
    assert f"cannot write {tmp_path / name}: " in capsys.readouterr().err


def test_models_lists_parameters(capsys):
    assert main(["models", "vit_ti16"]) == 0
    assert "5,717,416" in capsys.readouterr().out


def test_models_lists_published_weights_by_a_part_of_their_name(capsys):
    assert main(["models", "--pretrained", "test_vit.*"]) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["371,240", "0.08", "160", "apache-2.0", "hf://timm/test_vit.r160_in1k"]
    assert main(["models", "--pretrained", "g?mlp_s*"]) == 2
    assert main(["models", "--pretrained", "g*m*_24*"]) == 0
    told = capsys.readouterr()
    assert "1 more name cannot be built: 1 × this package has no MixerBlock" in told.err


def test_models_lists_released_checkpoints(capsys):
    assert main(["models", "--released"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["r50_l32", "i21k"]
    assert lines[1].split()[-1].startswith("R50_L_32-i21k-")
    assert "not measured here" in lines[-4]
    assert lines[-1] == "Licence: Apache-2.0, Google."
    index = Path(__file__).parents[1] / "golden" / "vision_transformer" / "augreg_index.csv"
    argv = ["models", "--released", "S/32", f"--index={index}", "--dataset=cifar100", "--top=2"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["vit_s32", "vit_s32"]
    assert lines[4].startswith("to start from, the reference takes S_32-i21k-")


def test_bench_step_prints_json(digits_npz, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "MATMULS", {"cpu": (64, 1)})
    out = tmp_path / "bench.json"
    argv = ["bench", "step", f"--config={TINY}:{digits_npz}", f"--json={out}"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert {"images_per_sec", "compile_seconds", "loop_overhead", "machine"} <= found.keys()


@pytest.mark.soak
def test_bench_checkpoint_prints_json(digits_npz, capsys):
    argv = ["bench", "checkpoint", f"--config={TINY}:{digits_npz}", "--config.checkpoint.every=6"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["stall_seconds"] < found["state_mb"] / found["save_mb_per_sec"]
    cost = found["save_cost_seconds"] / (6 * found["step_seconds"])
    assert found["save_fraction_of_training"] == pytest.approx(cost)
    assert found["restore_mb_per_sec"] > 0


def test_bench_eval_prints_json(digits_npz, capsys):
    assert main(["bench", "eval", f"--config={TINY}:{digits_npz}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["eval_over_forward"] > 0
    assert found["images_per_sec"] > 0


def test_bench_input_prints_json(digits_npz, capsys):
    assert main(["bench", "input", f"--config={TINY}:{digits_npz}"]) == 0
    assert json.loads(capsys.readouterr().out)["images_per_sec_per_core"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train"], "--config is missing"),
        (["train", "--config=c.py"], "--workdir is missing"),
        (["train", "--confg=c.py"], "unknown argument '--confg'; did you mean '--config'?"),
        (["train", "--config=absent.py", "--workdir=w"], "'absent.py': no such file"),
        (["evaluate", "--workdir=/nowhere/at/all"], "holds no run"),
        (["report", "--workdir=/nowhere/at/all"], "holds no run"),
        (["predict", "--workdir=/nowhere/at/all", "x.png"], "holds no run"),
        (["predict", "--workdir=w"], "required: IMAGE"),
        (["predict", "x.png"], "give --workdir or --checkpoint"),
        (["predict", "x.png", "--checkpoint=c", "--text=a"], "there is no checkpoint c"),
        (["predict", "x.png", "--checkpoint=/no/file.npz"], "/no/file.npz"),
        (["evaluate"], "give --workdir or --checkpoint"),
        (["evaluate", "--checkpoint=x"], "--checkpoint needs --config=FILE"),
        (
            ["evaluate", "--workdir=w", f"--step={'9' * 5000}"],
            "is no step; write a number, or best",
        ),
        (["train", "--config=c.py", "--workdir=w", "--restarts=-1"], "'-1' is no number from 0 on"),
        (["train", "--config=c.py", "--workdir=w", "--restarts="], "'' is no number from 0 on"),
        (["evaluate", "--workdir=w", "--step=²"], "'²' is no step; write a number, or best"),
        (["predict", "x.png", "--checkpoint=x", "--image-size=65536000"], "is no size; write 224"),
        (["evaluate", "--checkpoint=x", "--step=5"], "--step does not go with --checkpoint"),
        (["evaluate", "--workdir=w", "--config=c.py"], "--config does not go with --workdir"),
        (["evaluate", "--workdir=w", "--json=/no/m.json"], "there is no folder /no"),
        (["evaluate", "--workdir=w", "--json=/"], "cannot write /: that is a folder"),
        (["report", "a", "b", "--out=/"], "cannot write /: that is a folder"),
        (["predict", "x.png", "--workdir=w", "--labels=l"], "--labels does not go with --workdir"),
        (["predict", "x.png", "--workdir=w", "--model.depth=7"], "--model.FIELD does not go"),
        (["predict", "x.png", "--workdir=w", "--top=0"], "'0' is no number from 1 on"),
        (["predict", "x.png", "--workdir=w", "--out=x.jpg"], "written as a PNG: name it so"),
        (
            ["train", f"--config={TINY.parents[1] / 'setup.cfg'}", "--workdir=w"],
            "its name must end in .py",
        ),
        (["bench", "step", "--model=vit_ti16", "--batch=0"], "'0' is no number from 1 on"),
        (["convert", "/no/file.npz", "y.npz", "--to=npz"], "/no/file.npz"),
        (["convert", "x", "y", "--to=onnx"], "--to='onnx' is no checkpoint format"),
        (["fewshot"], "give --workdir or --config"),
        (["features", "x.png", "--checkpoint=/no/file.npz"], "/no/file.npz"),
        (["features", "x.png"], "give --workdir or --checkpoint"),
        (["models", "vit_b17"], "vit_b17"),
        (["models", "--dataset=cifar10"], "--dataset needs --released"),
        (["models", "--pretrained", "dino5"], "no published name contains 'dino5'"),
        (["models", "--pretrained=dino*", "vit_s16"], "write the name as --pretrained=PATTERN"),
        (["models", "--released", "--dataset=cifar"], "no released checkpoint with dataset cifar"),
        (["models", "--released", "--top=-1"], "--top=-1"),
        (["models", "--released", "--index=/no/index.csv"], "/no/index.csv"),
        (["bench", "speed", "--config=c.py"], "invalid choice: 'speed'"),
        (["models", "--config.seed=1"], "models takes no --config.seed"),
        (["train", "--config=c.py", "--config.seed"], "--config.seed has no value"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, message):
    assert message in fails(capsys, *argv)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=vit_z16", "vit_z16"),
        ("model.widht=3", "did you mean 'width'"),
        ("task.name=regresion", "config.task.name='regresion' is no task"),
        ("task.mixop=1", "did you mean 'mixup'"),
        ("task.loss=hinge", "write softmax or sigmoid"),
        ("optim.name=adamm", "adamm"),
        ("optim.schedule.name=cosin", "cosin"),
        ("data.source=tdfs", "tdfs"),
        ("batch_size=20", "not divisible by 8"),
        ("mesh.tensor=3", "does not fit 8 devices"),
        ("model.patch_size=3", "config.model.patch_size=3 does not divide the image of 8×8"),
        ("optim.lr=fast", "config.optim.lr='fast': write a number"),
        ("eval.sets.val.split=tset", "tset"),
        ("eval.sets.val2=5", "config.eval.sets.val2=5: write a section"),
        ("total=_", "config.total='_' is no duration"),
        ("checkpoint.keep_best=vall/accuracy", "where SPLIT is val or val_ema"),
        ("eval.sets=5", "write config.eval.sets.KEY, KEY of: val"),
        ("task.lora={'rank': 2, 'targets': '('}", "write one regular expression"),
        ("task.lora={'rank': 2, 'targets': ['.*']}", "write one regular expression"),
    ],
)
def test_bad_config_values_are_one_line(capsys, digits_npz, tmp_path, override, message):
    argv = ["train", f"--config={TINY}:{digits_npz}", f"--workdir={tmp_path}"]
    assert message in fails(capsys, *argv, f"--config.{override}")
    assert not (tmp_path / "checkpoints").exists()


def test_config_that_is_no_python_file(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1")
    argv = ["train", f"--config={tmp_path}/config.yaml", "--workdir=w"]
    assert "its name must end in .py" in fails(capsys, *argv)


def test_profile_of_steps_that_never_come(capsys, digits_npz, tmp_path):
    argv = ["train", f"--config={TINY}:{digits_npz}", f"--workdir={tmp_path}", "--profile=50:60"]
    assert "the run has only 12 steps" in fails(capsys, *argv)


def test_out_of_memory_is_one_line(capsys, monkeypatch, digits_npz, tmp_path):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.\nat"
        )

    monkeypatch.setattr(initial_state, "first_state", exhausted)
    argv = ["train", f"--config={TINY}:{digits_npz}", f"--workdir={tmp_path}"]
    assert main(argv) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "Out of memory allocating 4 bytes.): try more config.accum_steps" in line


def test_a_host_out_of_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(parser, "run", mock.Mock(side_effect=MemoryError))
    assert main(["train"]) == 1
    assert capsys.readouterr().err.startswith("error: out of memory (MemoryError): try more ")


def test_an_object_store_that_is_asked_too_often_is_not_out_of_memory():
    assert not is_out_of_memory(OSError("RESOURCE_EXHAUSTED: rate limit exceeded"))
    assert is_out_of_memory(RuntimeError("Ran out of memory in memory space hbm"))
    assert is_out_of_memory(MemoryError("Unable to allocate 74.5 GiB for an array"))


def test_evaluate_with_another_model(capsys, trained):
    argv = ["evaluate", f"--workdir={trained}", "--config.model.depth=3"]
    assert "of the shape that the config asks for" in fails(capsys, *argv)


def test_relative_workdir(digits_npz, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained.parent)
    workdir = f"--workdir={trained.name}"
    config = f"--config={TINY}:npz={digits_npz},pictures"
    assert main(["train", config, workdir, "--config.total=8"]) == 0
    assert f"report: {trained}/report.html" in capsys.readouterr().out
    assert main(["evaluate", workdir]) == 0


def test_unwritable_workdir(capsys, digits_npz, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    argv = ["train", f"--config={TINY}:{digits_npz}", f"--workdir={blocked}/run"]
    assert "cannot write there" in fails(capsys, *argv)


def test_files_that_cannot_be_written_are_named(capsys, trained, tmp_path):
    long, image = tmp_path / ("a" * 300), tmp_path / "digit.png"
    Image.new("L", (8, 8)).save(image)
    for argv in (
        ["evaluate", f"--workdir={trained}", f"--json={long}.json"],
        ["convert", str(trained), f"{long}/x", "--to=orbax"],
        ["export", str(trained), f"{long}", "--to=stablehlo"],
        ["features", f"--workdir={trained}", f"--out={long}.npz", str(image)],
        ["data", f"--config={TINY}:x.npz", f"--out={long}.png"],
    ):
        assert "File name too long" in fails(capsys, *argv)


def test_predict_names_what_is_no_image(capsys, trained, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    workdir = f"--workdir={trained}"
    assert "no.png: No such file" in fails(capsys, "predict", workdir, str(tmp_path / "no.png"))
    assert "notes.png: not an image that is read" in fails(
        capsys, "predict", workdir, str(tmp_path / "notes.png")
    )
    image = tmp_path / "digit.png"
    Image.new("L", (8, 8)).save(image)
    for flag in ("--attention", "--patches"):
        argv = ["predict", workdir, str(image), f"{flag}={tmp_path}/absent/out.png"]
        assert "cannot write" in fails(capsys, *argv)


def test_broken_config_json(capsys, trained, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in fails(capsys, "evaluate", f"--workdir={tmp_path}")


def test_keys_are_listed(capsys):
    assert main(["train", "--keys"]) == 0
    assert "optim.schedule.warmup=0" in capsys.readouterr().out
