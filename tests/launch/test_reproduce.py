"""From nothing to a row of the results table: in order, each stage once, after any interruption."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from vit_jax.cli.parser import parser_of, split_overrides
from vit_jax.errors import UserError
from vit_jax.launch import slices

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
reproduce = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reproduce)

FLAGS = ["--type=v4-16", "--zone=z", "--spot", "--price=2", "--config.batch_size=512"]
SETS = ("val", "minival", "real", "v2")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job in a copy of what the script reads of a checkout, with its bucket beside it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    root = tmp_path / "checkout"
    (root / "docs").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "recipes.md", root / "docs")
    (root / "configs").symlink_to(ROOT / "configs")
    found, dry_run = reproduce.parse(["vit_s16_i1k", f"--bucket={tmp_path / 'bucket'}/", *FLAGS])
    assert not dry_run
    return reproduce.dataclasses.replace(found, root=root)


class World:
    """Does what the commands would do; the command number `fails_at` is interrupted."""

    def __init__(self, fails_at=None, sets=SETS):
        self.calls, self.fails_at, self.sets = [], fails_at, sets

    def __call__(self, command):
        self.calls.append(command)
        if len(self.calls) - 1 == self.fails_at:
            return 75
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in command if "=" in flag)
        words = [word for word in command if not word.startswith("--")]
        if "copy_to" in flags:
            folder = Path(flags["copy_to"]) / words[1] / "1.0.0"
            folder.mkdir(parents=True)
            (folder / "dataset_info.json").write_text("{}")
        elif words[0] == "plan":
            plan = {"at_mfu": {"40%": {"chip_hours": 50.0}}, "num_chips": 8, "num_slices": 1}
            Path(flags["json"]).write_text(json.dumps({**plan, "topology": flags["topology"]}))
        elif words[:2] == ["tpu", "create"]:
            slices.remember(slices.Slices(words[2], zone=flags["zone"], type=flags["type"]))
        elif words[:2] == ["tpu", "train"]:
            assert slices.recall(words[2])
            self.train(Path(flags["workdir"]))
        elif words[:2] == ["tpu", "delete"]:
            slices.forget(words[2])
        elif words[0] == "evaluate":
            Path(flags["json"]).write_text(json.dumps({"v2/accuracy": 0.64}))
        return 0

    def train(self, workdir):
        workdir.mkdir(parents=True)
        record = {"commit": "abc", "packages": {"jax": "0.10"}, "command": ["train"], "config": {}}
        (workdir / "config.json").write_text(json.dumps(record))
        scores = {f"eval/{name}/accuracy": 0.7 + i / 100 for i, name in enumerate(self.sets)}
        rows = [{"step": 1, "train/loss": 6.9}, {"step": 9, **scores}]
        rows += [{"step": 9, "time/compile": 1800.0, "time/train": 3600.0, "time/eval": 60.0}]
        (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        (workdir / "DONE").write_text("step 9\n")


def actions(calls):
    """`["prepare imagenet2012", ..., "tpu create vit-s16-i1k"]`."""
    return [" ".join(word for word in call if not word.startswith("--")) for call in calls]


IN_ORDER = [
    *("prepare imagenet2012",) * 2,
    *("prepare imagenet2012_real",) * 2,
    *("prepare imagenet_v2/matched-frequency",) * 2,
    "plan",
    "tpu create vit-s16-i1k",
    "tpu train vit-s16-i1k",
    "tpu delete vit-s16-i1k",
]


def row(job):
    page = (job.root / "docs" / "recipes.md").read_text()
    (line,) = [line for line in page.splitlines() if line.endswith("| `vit_s16_i1k.py` |")]
    return line


def test_from_nothing_to_a_row(job):
    world = World()
    assert "| not run |" in row(job)
    assert reproduce.reproduce(job, world) == 0
    assert actions(world.calls) == IN_ORDER
    create, train = world.calls[-3], world.calls[-2]
    assert create[3:] == ["--type=v4-16", "--zone=z", "--spot"]
    assert train[3:] == [
        f"--workdir={job.bucket}/vit_s16_i1k",
        "--config=configs/vit_s16_i1k.py:others=real+v2",
        f"--config.data.dir={job.bucket}/tfds",
        "--config.batch_size=512",
    ]
    found = json.loads((job.root / "results" / "vit_s16_i1k.json").read_text())
    assert found["metrics"] == {f"{name}/accuracy": 0.7 + i / 100 for i, name in enumerate(SETS)}
    assert (found["commit"], found["packages"], found["step"]) == ("abc", {"jax": "0.10"}, 9)
    assert found["hours"] == pytest.approx(1.5)
    assert found["cost"] == {
        "chip_hours": {"planned at 40% MFU": 50, "measured": pytest.approx(12)},
        "dollars_per_chip_hour": 2,
        "dollars": {"planned at 40% MFU": 100, "measured": pytest.approx(24)},
    }
    log = (job.root / "results" / found["log"]).read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 9]
    cell = "| [70.00, ReaL 72.00, V2 73.00](../results/vit_s16_i1k.json) | `vit_s16_i1k.py` |"
    assert row(job).endswith(cell)

    again = World()
    assert reproduce.reproduce(job, again) == 0
    assert again.calls == []
    assert row(job).endswith(cell)


@pytest.mark.parametrize("fails_at", [1, 6, 7, 8, 9])
def test_after_an_interruption_it_goes_on_with_that_stage(job, fails_at, capsys):
    first, second = World(fails_at), World()
    assert reproduce.reproduce(job, first) == 75
    told = capsys.readouterr().err
    assert ("the slices cost until" in told) == (fails_at in (8, 9))
    assert reproduce.reproduce(job, second) == 0
    # A dataset is prepared in two commands, of which the first does nothing the second time.
    stage = fails_at - 1 if fails_at == 1 else fails_at
    assert actions(second.calls) == IN_ORDER[stage:]
    assert row(job).endswith("`vit_s16_i1k.py` |")


def test_other_slices_are_planned_anew(job):
    assert reproduce.reproduce(job, World(fails_at=7)) == 75
    other, world = reproduce.dataclasses.replace(job, type="v4-32"), World()
    assert reproduce.reproduce(other, world) == 0
    assert actions(world.calls) == IN_ORDER[6:]


def test_a_test_set_that_training_left_out_is_evaluated_at_the_end(job):
    world = World(sets=("val", "minival", "real"))
    assert reproduce.reproduce(job, world) == 0
    (evaluate,) = [call for call in world.calls if call[0] == "evaluate"]
    names = {flag.split(".")[3] for flag in evaluate if flag.startswith("--config.eval.sets.")}
    assert names == {"v2"}
    assert "ReaL 72.00, V2 64.00]" in row(job)


def test_a_dry_run_prints_commands_that_the_program_takes(job, capsys, monkeypatch):
    monkeypatch.setenv("VIT_JAX_PROGRAM", "./run.sh")
    reproduce.show(reproduce.dataclasses.replace(job, bucket="gs://nowhere"))
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert actions(command[1:] for command in commands) == [*IN_ORDER, "evaluate"]
    assert sorted(path.name for path in job.root.iterdir()) == ["configs", "docs"]
    job.folder.mkdir(parents=True)  # As it is when commands run.
    for command in commands:
        assert command[0] == "./run.sh"
        words, _ = split_overrides(command[1:], "--config.")
        parser_of(words[0]).parse_args(words[1:])


def test_a_recipe_without_a_row_is_told(job):
    with pytest.raises(UserError, match=r"no row whose command is `vit_s16_i1k.py:30`"):
        reproduce.filled(
            "| a | b |", reproduce.dataclasses.replace(job, recipe="vit_s16_i1k:30"), {}
        )


def test_the_shell_script_installs_first(tmp_path):
    root = tmp_path / "a checkout"
    for folder in ("scripts", "venv/bin"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "reproduce.sh", root / "scripts")
    for name in ("run.sh", "venv/bin/python"):
        (root / name).write_text(f'#!/bin/sh\necho {name} "$VIT_JAX_EXTRAS" "$@"\n')
        (root / name).chmod(0o755)
    done = subprocess.run(
        [root / "scripts" / "reproduce.sh", "digits", "--dry-run"],
        env={**os.environ, "VIT_JAX_VENV": str(root / "venv"), "VIT_JAX_EXTRAS": "cuda"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "run.sh cuda,tpu install",
        f"venv/bin/python cuda,tpu {root}/scripts/reproduce.py digits --dry-run",
    ]


@pytest.mark.soak
def test_a_tiny_imagenet_on_a_slice_from_create_to_the_row(cloud, job, tmp_path, monkeypatch):
    """Every command runs for real but `plan`, which needs libtpu where its outcome is not there.

    The slices are those of a stand-in for gcloud; their two hosts are processes of this machine.
    The commands follow each other, so that two busy cores take about eleven minutes.
    """
    monkeypatch.setenv("FAKE_GCLOUD_HOSTS", "2")
    data_dir = tmp_path / "prepared"
    write_datasets(data_dir)
    tiny = {
        "model.width": 24, "model.depth": 2, "model.num_heads": 2, "model.mlp_dim": 48,
        "model.representation_size": 24, "batch_size": 8, "total": 6, "eval.every": 3,
        "optim.schedule.warmup": 2, "log.pictures": False, "compilation_cache": "",
    }  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in tiny.items()]
    job = reproduce.dataclasses.replace(
        job, data_dir=str(data_dir), overrides=overrides, create=["--zone=z", "--poll=0"]
    )
    notes = reproduce.Notes(job.folder)
    (plan,) = [stage for stage in reproduce.stages(job, notes) if stage.name == "plan"]
    job.folder.mkdir(parents=True)
    assert World()(plan.commands[0]) == 0
    notes.add("plan", plan.commands)
    interrupted = []

    def call(command):
        if command[:2] == ["tpu", "train"] and not interrupted:
            interrupted.append(command)
            return 75
        return reproduce.call(command)

    assert reproduce.reproduce(job, call) == 75
    assert reproduce.reproduce(job, call) == 0
    found = json.loads((job.root / "results" / "vit_s16_i1k.json").read_text())
    assert found["step"] == 6
    assert {name.split("/")[0] for name in found["metrics"]} == set(SETS)
    for name in ("val", "real", "v2"):
        assert found["metrics"][f"{name}/num_examples"] == 10
    assert found["hours"] > 0
    assert found["config"]["batch_size"] == 8
    assert "](../results/vit_s16_i1k.json) | `vit_s16_i1k.py` |" in row(job)
    assert "v4-16" not in (cloud / "nodes.json").read_text()
    assert json.loads((cloud / "nodes.json").read_text()) == {}


def write_datasets(folder):
    """Writes a few images with the names, versions and features of TFDS's own datasets."""
    import numpy as np
    import tensorflow_datasets as tfds

    random = np.random.default_rng(0)

    def write(name, splits, labels):
        real = tfds.builder(name, data_dir=folder)

        def example(number):
            image = random.integers(0, 256, (40, 48, 3), np.uint8)
            return {"image": image, "file_name": f"{number}.JPEG", **labels(number)}

        tfds.dataset_builders.store_as_tfds_dataset(
            name=real.name,
            version=str(real.version),
            features=real.info.features,
            config=real.builder_config and real.builder_config.name,
            split_datasets={
                split: [(number, example(number)) for number in range(count)]
                for split, count in splits.items()
            },
            data_dir=folder,
            file_format="array_record",
        )

    def label(number):
        return {"label": number % 1000}

    def real_label(number):
        return {"original_label": number, "real_label": [] if number == 3 else [number, 5]}

    write("imagenet2012", {"train": 200, "validation": 10}, label)
    write("imagenet_v2/matched-frequency", {"test": 10}, label)
    write("imagenet2012_real", {"validation": 10}, real_label)
