"""Answers as CSV and JSON lines, and the checkpoint that they come from."""

import csv
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from pyarrow import parquet

from vit_jax import models
from vit_jax.__main__ import main
from vit_jax.checkpoints import keep_best
from vit_jax.checkpoints.input_spec import InputSpec
from vit_jax.cli.commands import predict
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.inference.predict import Predictor
from vit_jax.inference.preparation import ByInputSpec
from vit_jax.inference.results import Results, identity_of
from vit_jax.tasks import _classes, classification
from vit_jax.training import evaluate
from vit_jax.types import ArraySpec, DataInfo

NAMES = ("=1+1", "a\ncat", "dog", "dog")
FILES = ["@home.png", "a,b.png", "new\nline.png", "\udcff.png"]
PROBABILITY = np.array(
    [[0.5, 0.25, 0.125, 0.125], [0, 0, 1, 0], [0.1, 0.2, 0.3, 0.4], [1, 0, 0, 0]], np.float32
)


def task(names=NAMES):
    return SimpleNamespace(info=SimpleNamespace(class_names=names))


def batches(files, size=3):
    """The answers for files, in batches that are not of one size."""
    for start in range(0, len(files), size):
        names = files[start : start + size]
        yield names, {"probability": PROBABILITY[[FILES.index(name) for name in names]]}


def test_csv_has_the_top_classes_and_nothing_that_a_spreadsheet_runs(tmp_path):
    path = tmp_path / "a.csv"
    assert Results(task(), 2).write(str(path), FILES, batches) == 4
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert rows[1] == ["'@home.png", "'=1+1", "0.5", "a cat", "0.25"]
    assert rows[2] == ["a,b.png", "dog (2)", "1.0", "'=1+1", "0.0"]
    assert rows[3] == ["new\nline.png", "dog (3)", "0.4", "dog (2)", "0.3"]
    assert rows[4][0] == r"\udcff.png"
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)


def test_json_lines_have_every_probability_on_request(tmp_path):
    path = tmp_path / "a.jsonl"
    Results(task(), 1, everything=True).write(str(path), FILES, batches)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["file"] for row in rows] == FILES
    assert rows[2]["top"] == [{"class": "dog (3)", "probability": 0.4}]
    assert list(rows[0]["probabilities"].values()) == [0.5, 0.25, 0.125, 0.125]
    path = tmp_path / "all.csv"
    Results(task(()), 9, everything=True).write(str(path), FILES, batches)
    header, first = path.read_text().splitlines()[:2]
    assert header.split(",")[-5:] == ["probability_4", *(f"probability of {i}" for i in range(4))]
    assert first.split(",")[-4:] == ["0.5", "0.25", "0.125", "0.125"]


def test_other_answers_are_refused_and_leave_no_file(tmp_path):
    other = [(FILES[:1], {"boxes": np.zeros((1, 4))})]
    with pytest.raises(UserError, match="--results is for tasks whose answers are probabilities"):
        Results(task(), 1).write(str(tmp_path / "a.csv"), FILES, lambda _: other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("cut", [0, 9])
def test_an_interrupted_file_is_finished_by_the_next_call(tmp_path, suffix, cut):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"a{suffix}"
    asked = []

    def asked_for(files):
        asked.append(files)
        return batches(files)

    def first_three(files):
        yield next(asked_for(files))
        raise KeyboardInterrupt

    def results(identity="this"):
        return Results(task(), 2, everything=True, identity=identity)

    results().write(str(whole), FILES, batches)
    with pytest.raises(KeyboardInterrupt):
        results().write(str(path), FILES, first_three)
    partial = tmp_path / f"a{suffix}.partial"
    assert not path.exists()
    partial.write_bytes(partial.read_bytes()[: -cut or None])  # A line may be cut off.
    assert results().write(str(path), FILES, asked_for) == 4
    assert asked == [FILES, FILES[2 if cut else 3 :]]
    assert path.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    with pytest.raises(KeyboardInterrupt):
        results().write(str(path), FILES, first_three)
    results("another model").write(str(path), FILES, batches)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("damage", [b"\0" * 40 + b"\n", b"{\n", b"3\n", b"\xff\n"])
def test_answers_behind_a_damaged_line_are_given_again(tmp_path, damage):
    path, asked = tmp_path / "a.csv", []

    def interrupted(files):
        yield from batches(files, size=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Results(task(), 1).write(str(path), FILES, interrupted)
    partial = tmp_path / "a.csv.partial"
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    Results(task(), 1).write(str(path), FILES, lambda files: asked.append(files) or batches(files))
    assert asked == [FILES[1:]]
    whole = tmp_path / "whole.csv"
    Results(task(), 1).write(str(whole), FILES, batches)
    assert path.read_text() == whole.read_text()


def test_two_calls_do_not_write_one_file(tmp_path):
    path = str(tmp_path / "a.csv")

    def meanwhile(files):
        for batch in batches(files):
            with pytest.raises(UserError, match=r"another process is writing .*a\.csv\.partial;"):
                Results(task(), 1).write(path, FILES, batches)
            yield batch

    assert Results(task(), 1).write(path, FILES, meanwhile) == 4
    with open(path, newline="") as file:
        assert len(list(csv.reader(file))) == 5
    Results(task(), 1).write(path, FILES, batches)
    assert os.listdir(tmp_path) == ["a.csv"]


def test_parquet_has_the_columns_of_csv(tmp_path):
    Results(task(), 1).write(str(tmp_path / "a.parquet"), FILES, batches)
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert rows[0] == {"file": "@home.png", "class_1": "=1+1", "probability_1": 0.5}
    assert rows[3]["file"] == r"\udcff.png"


def test_answers_of_unchanged_files_are_kept_when_others_are_removed_or_changed(tmp_path):
    files = [str(tmp_path / f"{number}.png") for number in range(5)]
    for file in files:
        with open(file, "w") as stored:
            stored.write(file)
    asked = []

    def one_by_one(given):
        for file in given:
            asked.append(files.index(file))
            if asked[-1] == 2:
                raise UserError("2.png: damaged PNG")
            yield [file], {"probability": PROBABILITY[:1]}

    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=r"2\.png: damaged"):
        Results(task(), 1).write(str(path), files, one_by_one)
    os.unlink(files[2])
    os.utime(files[0], (1, 1))
    rest = [files[4], files[1], files[0], files[3], files[1]]
    told = []
    assert Results(task(), 1, tell=told.append).write(str(path), rest, one_by_one) == 5
    assert asked == [0, 1, 2, 4, 0, 3]
    assert told == [f"1 images are in {path}.partial already"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.pop("file") for row in rows] == rest
    assert all(list(row) == ["top"] for row in rows)


def test_the_identity_is_that_of_model_and_settings():
    params = {"a": np.arange(3.0), "b": np.float32(1)}
    one = identity_of(params, ["as it is"])
    assert one == identity_of({**params}, ["as it is"])
    others = {identity_of(params, ["as it is", "cat"]), identity_of({}, ["as it is"])}
    assert len(others - {one}) == 2


def test_answers_of_another_model_or_preparation_are_not_resumed(tmp_path, monkeypatch):
    asked = []

    def answers(predictor, files):
        asked.append(list(files))
        yield SimpleNamespace(pictures=files[:1], outputs={"probability": PROBABILITY[:1]})
        raise KeyboardInterrupt

    def ask(*, exif="apply", loss="softmax", num_heads=2, **spec):
        fields = {"width": 16, "depth": 1, "num_heads": num_heads}
        model = models.build("vit", patch_size=4, num_classes=4, **fields)
        info = DataInfo({"image": ArraySpec((8, 8, 3), np.dtype(np.uint8))}, 4, NAMES)
        task = classification.Task(model, info, loss=loss)
        prepared = ByInputSpec(InputSpec(size=(8, 8), **spec), 3, exif)
        predictor = Predictor(task, {"a": np.ones(3, np.float32)}, info, prepared)
        path = str(tmp_path / "a.csv")
        given = SimpleNamespace(results=path, top=1, probabilities=False, text=[])
        with pytest.raises(KeyboardInterrupt):
            predict._write(given, predictor, FILES)

    monkeypatch.setattr(Predictor, "answers", answers)
    changes = ({"mean": (0.0,)}, {"rounds_to_even": True}, {"exif": "ignore"}, {"num_heads": 4})
    for change in (*changes, {"loss": "sigmoid"}):
        ask()  # The file that is there differs by the change alone.
        asked.clear()
        ask(**change)
        assert asked.pop() == FILES
        ask(**change)
        assert asked.pop() == FILES[1:]


def test_rows_of_other_classes_are_not_resumed(tmp_path):
    def stopped(files):
        yield next(batches(files))
        raise KeyboardInterrupt

    path = tmp_path / "a.csv"
    with pytest.raises(KeyboardInterrupt):
        Results(task(), 1).write(str(path), FILES, stopped)
    Results(task(("car", "bus", "tram", "ship")), 1).write(str(path), FILES, batches)
    with open(path, newline="") as file:
        assert [row[1] for row in csv.reader(file)] == ["class_1", "car", "tram", "ship", "car"]


def test_names_of_classes_are_printed_on_one_line():
    assert _classes.ranking(PROBABILITY[:1], NAMES, 2) == [[" 50.00%  =1+1", " 25.00%  a cat"]]
    assert _classes.best(PROBABILITY[:1], ("\x1b[2J", *NAMES[1:])) == [r"\x1b[2J 50%"]


def test_the_command_writes_what_the_predictor_answers(
    tiny_config, left_by_a_run, digits_npz, tmp_path, capsys
):
    from PIL import Image

    left_by_a_run(tiny_config(), tmp_path / "run", image=((8, 8, 1), np.uint8))
    (tmp_path / "in").mkdir()
    with np.load(digits_npz) as arrays:
        for number, image in enumerate(arrays["image"][:3]):
            Image.fromarray(image[..., 0]).save(tmp_path / "in" / f"{number}.png")
    predict = ["predict", f"--workdir={tmp_path}/run", f"{tmp_path}/in"]
    out = tmp_path / "out.jsonl"
    assert main([*predict, "--step=1", f"--results={out}", "--probabilities"]) == 0
    assert capsys.readouterr().out == f"results: {out} (3 images)\n"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    expected = Predictor.from_workdir(str(tmp_path / "run")).predict([row["file"] for row in rows])
    found = [list(row["probabilities"].values()) for row in rows]
    np.testing.assert_allclose(found, expected["probability"], atol=1e-6)
    for flag, message in {
        "--step=7": "has no step 7; it has [1]",
        "--step=best": "this run kept no best checkpoint",
        "--step=last": "'last' is no step; write a number, or best",
        f"--results={tmp_path}/out.txt": "written as .csv, .jsonl or .parquet",
        "--probabilities": "needs --results=FILE",
    }.items():
        assert main([*predict, flag]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "best"),
    [("val/accuracy", 6), ("val/loss", 3), ("val/f1_of_cats", None), ("val/f1", None)],
)
def test_the_best_step_is_that_of_the_metric_that_was_kept(monkeypatch, tmp_path, metric, best):
    stored = {
        3: {"val/accuracy": 0.5, "val/loss": 0.1},
        6: {"val/accuracy": 0.9, "val/loss": 0.2},
        7: {},
        9: {"val/accuracy": float("nan"), "val/loss": float("nan"), "val/f1": float("nan")},
    }
    monkeypatch.setattr(
        keep_best.manifest, "read", lambda path: SimpleNamespace(metrics=stored[int(path.name)])
    )
    store = SimpleNamespace(steps=lambda: list(stored), directory=tmp_path, newest=lambda: 9)
    config = default_config()
    config.checkpoint.keep_best = metric
    if best is None:
        with pytest.raises(UserError, match=r"does not say|kept no best"):
            evaluate.step_of(store, config, "best")
    else:
        assert evaluate.step_of(store, config, "best") == best
    assert evaluate.step_of(store, config, None) == 9
    assert evaluate.step_of(store, config, "6") == 6
