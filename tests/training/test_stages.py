"""Runs whose settings change at given steps: exact across boundaries, and what is refused."""

import dataclasses
import importlib
import json
import shutil
import threading
import time
import types
from concurrent.futures import Future
from unittest import mock

import numpy as np
import pytest
from etils import epath

from vit_jax import config as config_lib
from vit_jax.checkpoints.store import Store, flatten
from vit_jax.errors import UserError
from vit_jax.parallel import accelerators
from vit_jax.tracking import read_metrics
from vit_jax.tracking.step_log import Stopwatch
from vit_jax.training import background
from vit_jax.training.loop import train
from vit_jax.training.run import Run
from vit_jax.training.stages import Batches, Stage, Stages, stages_of
from vit_jax.training.workdir import Workdir

pytestmark = pytest.mark.usefixtures("one_device")

FLEXI = {
    "model__name": "flexivit_s",
    "model__width": 8,
    "model__depth": 1,
    "model__mlp_dim": 16,
    "model__patch_size": 2,
    "model__kernel_size": 4,
    "model__table_grid": 2,
    "total": 5,
    "checkpoint__every": 2,  # The third step is saved because its stage ends.
    "checkpoint__keep_last": 9,
}
LOW = {"model__patch_size": 4, "task__label_smoothing": 0.1}
STAGED = {"stages__low__until": "50%", **{f"stages__low__{key}": x for key, x in LOW.items()}}


@pytest.fixture(scope="module")
def flexible(digits_npz, request):
    """`flexible(key=value, ...)` → the config of a FlexiViT that is not evaluated."""

    def make(**keys):
        given = {key.replace("__", "."): str(value) for key, value in {**FLEXI, **keys}.items()}
        config = config_lib.load(f"{request.config.rootpath}/tests/tiny.py:{digits_npz}", given)
        bare = config.to_dict()
        bare["eval"]["sets"] = {}
        return config_lib.validate(type(config)(bare))

    return make


def stored(config, workdir):
    """Every array of a run's newest checkpoint, by name."""
    run = Run.build(config)
    restored = Store(workdir / "checkpoints").restore_newest(run.abstract)
    return arrays(restored.tree)


def arrays(state):
    return {name: np.asarray(leaf) for name, leaf in flatten(state).items()}


def losses(workdir):
    return {row["step"]: row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row}


@pytest.fixture(scope="module")
def staged(flexible, running_on_one_device, tmp_path_factory):
    """A finished run of 5 steps whose first 3 are a stage: (config, workdir)."""
    config, workdir = flexible(**STAGED), tmp_path_factory.mktemp("staged")
    with running_on_one_device():
        train(config, str(workdir))
    return config, workdir


def test_a_run_with_stages_is_its_stages_one_after_the_other(staged, flexible):
    """It equals a run that a person stops and resumes with other settings."""
    config, workdir = staged
    state, found = None, {}
    for run, steps in ((Run.build(flexible(**LOW)), (1, 2, 3)), (Run.build(flexible()), (4, 5))):
        state, train_step = state or run.make_state(), run.compile_step()
        with run.open_feed(steps[0] - 1) as feed:
            for step in steps:
                state, metrics = train_step(state, feed.next_batch())
                found[step] = float(metrics["loss"])
    assert found == losses(workdir)
    np.testing.assert_equal(arrays(state), stored(config, workdir))


@pytest.fixture
def at_once(monkeypatch):
    """Work in the background is done when it is started."""

    def start(function):
        future = Future()
        try:
            future.set_result(function())
        except RuntimeError as error:
            future.set_exception(error)
        return future

    monkeypatch.setattr(background, "start", start)


def test_a_program_that_cannot_be_compiled_ends_the_run_before_its_stage(
    flexible, monkeypatch, at_once
):
    def compile_step(run):
        if run.start == 3:
            raise RuntimeError("out of memory")
        return run.start

    monkeypatch.setattr(Run, "compile_step", compile_step)
    stages = Stages(Run.build(flexible(**STAGED)))
    assert stages.compiled(1) == 0
    with pytest.raises(RuntimeError, match="out of memory"):
        stages.program(1, mock.MagicMock(), Stopwatch(), 0.0)


def test_the_wait_for_the_first_program_is_announced(flexible, monkeypatch):
    announced = threading.Event()
    monkeypatch.setattr(Run, "compile_step", lambda _: announced.wait(60))
    stages, log = Stages(Run.build(flexible())), mock.MagicMock()
    log.message.side_effect = lambda _: announced.set()
    assert stages.first(1, log)
    log.message.assert_called_once_with(
        "compiling the training step, which may take minutes for a large model"
    )
    assert stages.first(1, log)
    log.message.assert_called_once()  # There was nothing left to wait for.


def test_flops_are_counted_before_the_loop_asks_for_them(flexible, monkeypatch, at_once):
    counted = []
    monkeypatch.setattr(Run, "compile_step", lambda run: run.start)
    monkeypatch.setattr(
        Run, "train_flops_per_example", lambda run: counted.append(run.start) or 7 + run.start
    )
    run = Run.build(flexible(**STAGED))
    Stages(run).prepare(1)
    assert not counted  # No row of a run on CPUs has them.
    monkeypatch.setattr(accelerators, "of_kind", lambda _: "some chip")
    stages = Stages(run)
    stages.prepare(1)
    stages.program(2, mock.MagicMock(), Stopwatch(), 0.0)
    assert counted == [0, 3]
    assert stages.train_flops_per_example() == 7
    stages.program(4, mock.MagicMock(), Stopwatch(), 0.0)
    assert stages.train_flops_per_example() == 10
    assert counted == [0, 3]


@pytest.mark.parametrize(
    "step", [3, pytest.param(2, marks=pytest.mark.soak), pytest.param(4, marks=pytest.mark.soak)]
)
def test_a_run_that_dies_around_a_boundary_goes_on_bit_for_bit(staged, tmp_path, step, capsys):
    config, workdir = staged
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "DONE").unlink()
    for later in range(step + 1, 6):
        shutil.rmtree(tmp_path / "checkpoints" / str(later))
    assert Store(tmp_path / "checkpoints").steps()[-1] == step
    train(config, str(tmp_path))
    shown = capsys.readouterr().err
    assert ("stage low, steps 1 to 3" in shown) == (step < 3)
    assert "last stage (the config itself), steps 4 to 5" in shown
    assert losses(tmp_path) == losses(workdir)
    np.testing.assert_equal(stored(config, tmp_path), stored(config, workdir))


def test_the_wait_for_the_next_program_is_time_of_the_compiler_and_not_of_training(
    flexible, tmp_path, monkeypatch
):
    """The program is prepared one stage ahead, and speeds are measured anew."""
    stages = Stages(Run.build(flexible(**STAGED)))
    asked = []
    monkeypatch.setattr(Run, "compile_step", lambda run: asked.append(run.start) or run.start)
    times = Stopwatch()
    log = mock.MagicMock()
    compiled, waits = stages.compiled, []

    def slow(step):
        waits.append(step)
        time.sleep(0.5 if len(waits) == 2 else 0)  # The second wait is that at the boundary.
        return compiled(step)

    monkeypatch.setattr(stages, "compiled", slow)
    assert compiled(2) == 0
    with times("train"):
        assert stages.program(2, log, times, 0.5) == 0
        compiled(4)
        assert asked == [0, 3]
        assert not log.measure_from.called
        assert stages.program(4, log, times, 0.75) == 3
    log.measure_from.assert_called_once_with(3, 0.75)
    names = [call[0] for call in log.mock_calls]
    assert names.index("flush") < names.index("paused") < names.index("measure_from")
    assert len(waits) == 3
    assert times.seconds["compile"] >= 0.5 > times.seconds["train"]
    assert asked == [0, 3]
    assert [stages.ends(step) for step in (2, 3, 4, 5)] == [False, True, False, True]


def test_a_pipeline_reads_no_batch_of_the_next_stage_and_is_closed():
    opened = []

    class Opened(list):
        num_bad_images = 1
        closed = False

        def close(self):
            self.closed = True

    def batches(start, stop):
        assert all(one.closed for one in opened)
        opened.append(Opened(range(start + 1, stop + 1)))
        return opened[-1]

    run = types.SimpleNamespace(batches=batches)
    given = Batches([Stage("low", 0, 3, run), Stage("", 3, 5, run)], 1)
    assert list(given) == [2, 3, 4, 5]
    assert [one.closed for one in opened] == [True, True]
    assert given.num_bad_images == 2
    stopped = Batches(given._stages, 1)
    batches = iter(stopped)
    assert next(batches) == 2
    stopped.close()
    assert list(batches) == [3]  # What was read already; the next pipeline is not opened.
    assert len(opened) == 3


def test_boundaries_are_times_of_the_whole_run(flexible):
    keys = {"batch_size": 100, "total": "10 epochs", "stages__b__until": "5 epochs"}
    stages = stages_of(Run.build(flexible(**keys, stages__a__until="80%", stages__off__until=0)))
    total = stages[-1].run.duration.total
    later = -(-total * 4 // 5)
    assert [(stage.name, stage.start, stage.end) for stage in stages] == [
        ("b", 0, round(total / 2)),
        ("a", round(total / 2), later),
        ("", later, total),
    ]
    whole = Stages(stages[-1].run)
    steps = (1, round(total / 2), round(total / 2) + 1, total, total + 1)
    assert [whole.at(step).name for step in steps] == ["b", "b", "a", "", ""]
    assert all(stage.run.source is stages[-1].run.source for stage in stages)
    assert not stages[0].run.config.stages


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"until": 2, "seed": 1},
            r"stages\.x\.seed: a stage cannot change it, because checkpoints",
        ),
        ({"until": 2, "batch_size": 8}, r"stages\.x\.batch_size: a stage cannot change it"),
        ({"until": 2, "model": {"width": 4}}, r"stages\.x\.model\.width: a stage cannot change"),
        ({"until": 2, "optim": {"name": "lion"}}, r"optim\.name: a stage cannot change it"),
        (
            {"until": 2, "total": 3},
            r"stages\.x\.total: a stage cannot change it, because it holds .*write config\.total",
        ),
        (
            {"until": 2, "eval": {"every": 3}},
            r"stages\.x\.eval\.every: a stage cannot change it, because it holds",
        ),
        (
            {"until": 2, "model": {"head_zero_init": False}},
            r"head_zero_init: a stage cannot change it, because it holds",
        ),
        (
            {
                "until": 2,
                "task": {"distill": {"model": {"name": "vit_s16"}, "checkpoint": "b.npz"}},
            },
            r"x\.task\.distill\.checkpoint: a stage cannot change it, because it holds",
        ),
        (
            {"until": 2, "model": {"initialization": "deit"}},
            "initialization: a stage cannot change it, because it holds",
        ),
        ({"until": 2, "stages": {"y": {"until": 1}}}, "a stage cannot change it, because it holds"),
        ({"until": 2, "task": 3}, r"stages\.x: config\.task=3: write a section"),
        ({"until": 2, "tusk": 3}, r"stages\.x: config\.tusk.*did you mean 'task'"),
        ({"until": 2, "optim": {"lr": -1}}, r"stages\.x: config\.optim\.lr=-1.0: write"),
        ({"until": "soon"}, r"config\.stages\.x\.until='soon' is no duration"),
        ({"task": {"mixup": 0.1}}, r"stages\.x=.*write a section with `until`"),
        (3, r"stages\.x=3: write a section with `until`"),
    ],
)
def test_a_stage_that_no_run_can_have_is_refused_in_one_line(stage, message):
    config = config_lib.default_config()
    config.stages = {"x": stage}
    with pytest.raises(UserError, match=message) as error:
        config_lib.validate(config)
    assert len(str(error.value).splitlines()) == 1


def test_a_stage_cannot_change_what_only_evaluation_reads(flexible, monkeypatch):
    run = Run.build(flexible(stages__x__until=2, stages__x__task__label_smoothing=0.1))
    assert [stage.name for stage in stages_of(run)] == ["x", ""]
    monkeypatch.setattr(type(run.task), "of_evaluation", ("label_smoothing",))
    with pytest.raises(UserError, match=r"x\.task\.label_smoothing: .*because only evaluation"):
        stages_of(run)


@pytest.mark.parametrize("name", ["segmentation", "detection", "multilabel", "contrastive"])
def test_fields_of_evaluation_are_fields(name):
    task = importlib.import_module(f"vit_jax.tasks.{name}").Task
    fields = {field.name for field in dataclasses.fields(task)}
    assert task.of_evaluation
    assert set(task.of_evaluation) < fields


def test_a_stage_may_weigh_the_teacher_of_the_run_differently():
    config = config_lib.default_config()
    distill = {"model": {"name": "vit_s16"}, "checkpoint": "a.npz"}
    config.task.distill = distill
    config.stages = {"x": {"until": 2, "task": {"distill": {**distill, "weight": 0.5}}}}
    assert config_lib.validate(config).stages.x.task.distill.weight == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"stages__x__until": 2, "stages__x__model__patch_size": 2},
            r"backbone\.patch_embed\.kernel is .* in this stage and .*take a FlexiViT",
        ),
        (
            {"stages__x__until": 2, "stages__x__ema_decay": 0.0},
            r"stages\.x: all stages must have the arrays of one state, .*change ema_decay",
        ),
        (
            {"stages__x__until": 2, "stages__x__optim__freeze": ["head/.*"]},
            r"but opt_state\..*take optim\.freeze_until",
        ),
        (
            {"stages__x__until": 2, "stages__x__spikes__factor": 2.0},
            r"but losses\..*may change spikes, but not switch the guard",
        ),
        ({"stages__x__until": 12}, r"until=12 is step 12: write a time before the end of the run"),
        (
            {"stages__x__until": 6, "stages__y__until": "50%"},
            r"until='50%' is step 6: write a time before the end of stage x",
        ),
    ],
)
def test_stages_that_do_not_fit_one_state_are_refused_before_the_first_step(
    tiny_config, keys, message
):
    run = Run.build(tiny_config(model__depth=0, model__position="none", **keys))
    with pytest.raises(UserError, match=message) as error:
        Stages(run)
    assert len(str(error.value).splitlines()) == 1


def test_positions_for_another_grid_are_refused_with_the_grid_to_write(tiny_config):
    """A stage of other images, which preprocessing makes, has another table of positions."""
    keys = {"data__source": "fake", "data__name": "x", "data__split": "train"}
    keys |= {"data__args__num_classes": 10, "data__args__encoded": True}
    smaller = {"stages__x__until": 2, "stages__x__data__pp": "decode|resize(16)"}
    with pytest.raises(UserError, match=r"pos_embed is .*position_grid=\[8,8\]"):
        build(tiny_config, **keys, **smaller)
    first, last = build(tiny_config, **keys, **smaller, model__position_grid=[8, 8])
    assert [stage.run.task.image_spec.shape[0] for stage in (first, last)] == [16, 32]
    with pytest.raises(UserError, match=r"pos_embed is .*position_grid=\[4,16\]"):
        build(tiny_config, **keys, **smaller, data__pp="decode|resize((16,64))")


def build(tiny_config, **keys):
    from vit_jax import data

    config = tiny_config(**{"data__pp": "decode|resize(32)", **keys})
    return stages_of(Run.build(config, source=data.expect(config.data)))


def test_a_resume_says_when_its_step_is_in_another_stage_than_before(tiny_config, tmp_path):
    stage = {"stages__low__until": "50%", "stages__low__task__label_smoothing": 0.1}
    before = tiny_config(total=12, **stage)
    workdir = Workdir(epath.Path(tmp_path))
    assert workdir.changed_stage(before, 99, 7) == []
    record = {"config": before.to_dict(), "version": 1}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert workdir.changed_stage(before, 99, 7) == []
    longer = tiny_config(total=20, **stage)
    assert [workdir.changed_stage(longer, 99, step) for step in (6, 11)] == [[], []]
    moved = ["stage of step 7: last stage (the config itself) → stage low"]
    assert workdir.changed_stage(longer, 99, 7) == moved
    assert workdir.changed_stage(tiny_config(total=12), 99, 6) == [
        "stage of step 6: stage low → last stage (the config itself)"
    ]
