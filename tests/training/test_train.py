"""The loop end to end, in one process: resume, meshes, divergence, logs, evaluation."""

import json
import shutil

import equal_runs
import jax
import numpy as np
import pytest
from jax import monitoring

from vit_jax import data
from vit_jax.checkpoints.store import Store, flatten
from vit_jax.errors import Diverged, Interrupted, UserError
from vit_jax.parallel import sharding
from vit_jax.tasks import classification
from vit_jax.tracking import read_metrics
from vit_jax.tracking.metrics import SCORE
from vit_jax.tracking.step_log import StepLog
from vit_jax.training import step
from vit_jax.training.evaluate import Abandoned, Evaluator
from vit_jax.training.loop import train
from vit_jax.training.run import Run


def final_state(config, workdir):
    """Every array of a run's newest checkpoint, by name."""
    run = Run.build(config)
    restored = Store(workdir / "checkpoints").restore_newest(run.abstract)
    return {name: np.asarray(leaf) for name, leaf in flatten(restored.tree).items()}


def losses(workdir):
    return {row["step"]: row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row}


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        if tolerance:
            np.testing.assert_allclose(left[name], right[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(request, tmp_path_factory, digits_npz, drawing_reports):
    """A finished run of 12 steps on the 8×1×1 mesh: (config, workdir)."""
    from vit_jax import config as config_lib

    config = config_lib.load(f"{request.config.rootpath}/tests/tiny.py:npz={digits_npz},full=True")
    workdir = tmp_path_factory.mktemp("undisturbed")
    with drawing_reports():
        train(config, str(workdir))
    return config, workdir


def test_a_run_leaves_what_it_promises(undisturbed):
    _, workdir = undisturbed
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["batch_size"] == 16
    assert record["packages"]["jax"] == jax.__version__
    assert record["devices"] == {"kind": jax.devices()[0].device_kind, "count": 8}
    assert (workdir / "DONE").read_text() == "step 12\n"
    assert (workdir / "report.html").stat().st_size > 10_000
    assert [path.name for path in sorted((workdir / "checkpoints").iterdir())] == ["12", "9"]
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["eval/val/num_examples"] == 30
    assert {"eval/val/accuracy", "eval/val_ema/accuracy", "train/lr"} <= rows[-1].keys()


def test_logged_lr_is_the_one_applied(undisturbed):
    config, workdir = undisturbed
    run = Run.build(config)
    for row in read_metrics(workdir):
        expected = float(run.optimizer.lr(row["step"] - 1))
        assert row["train/lr"] == pytest.approx(expected, rel=1e-5)  # cos in float32, jitted or not
    assert read_metrics(workdir)[0]["train/lr"] == 0.0  # The first update uses schedule(0).


@pytest.fixture(scope="module")
def half(undisturbed, tmp_path_factory):
    """The workdir of the same run, which died after step 6; it is to be copied."""
    workdir = tmp_path_factory.mktemp("half")
    with pytest.raises(StopIteration):
        stop_after(6, undisturbed[0], workdir)
    return workdir


def test_two_halves_equal_the_whole_bit_for_bit(undisturbed, half, tmp_path):
    config, workdir = undisturbed
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    train(config, str(tmp_path))
    assert_same(final_state(config, workdir), final_state(config, tmp_path))
    assert losses(tmp_path) == losses(workdir)


def stop_after(steps, config, workdir):
    """Trains until the checkpoint of `steps` is on disk, then dies without a word."""
    original = Store.save

    def save(self, at, *args, **kwargs):
        original(self, at, *args, **kwargs)
        if at == steps:
            self.wait()
            raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "save", save)
        train(config, str(workdir))


OTHER_MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__zero1": True}


# test_resume_changes.py says that another mesh restores the same, and test_mesh_equality.py that it
# then computes the same.
@pytest.mark.soak
def test_resume_on_another_mesh_gives_the_same_losses(undisturbed, half, tiny_config, tmp_path):
    config, workdir = undisturbed
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    meshed = tiny_config(full=True, **OTHER_MESH)
    train(meshed, str(tmp_path))
    whole, pieces = losses(workdir), losses(tmp_path)
    np.testing.assert_allclose(list(pieces.values()), list(whole.values()), rtol=2e-5)
    left, right = final_state(config, workdir), final_state(meshed, tmp_path)
    # Adam divides by the root of tiny second moments, so rounding grows to lr's own scale there.
    assert_same(left, right, rtol=1e-3, atol=2e-4)


def test_fixed_keys_are_refused_and_warned_ones_told(tiny_config, tmp_path, capsys):
    with pytest.raises(StopIteration):
        stop_after(3, tiny_config(), tmp_path)
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(UserError, match=r"model\.width: 16 → 32"):
        train(tiny_config(model__width=32), str(tmp_path))
    with pytest.raises(UserError, match="seed: 0 → 1"):
        train(tiny_config(seed=1), str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
    other = {"optim__lr": 1e-3, "optim__weight_decay": 0.0, "optim__clip_norm": 0.0}
    changed = tiny_config(total=4, ema_decay=0.0, mesh__data=2, mesh__fsdp=4, **other)
    train(changed, str(tmp_path))
    shown = capsys.readouterr().err
    assert "changed since the checkpoint: optim.lr: 0.003 → 0.001" in shown
    assert "resuming after step 3" in shown


def nan_images(monkeypatch, steps):
    """Poisons the batches of the given steps (0-based) with one infinite pixel."""
    original = data.train_batches

    class Poisoned:
        num_bad_images = 0

        def __init__(self, batches, start):
            self.batches, self.at = batches, start

        def __iter__(self):
            for batch in self.batches:
                image = batch["image"].astype(np.float32) / 127.5 - 1
                if self.at in steps:
                    image[0, 0, 0] = np.inf
                self.at += 1
                yield {**batch, "image": image}

        def close(self):
            self.batches.close()

    def spec(source, pp):
        found = element_spec(source, pp)
        return {**found, "image": found["image"]._replace(dtype=np.dtype(np.float32))}

    element_spec = data.element_spec
    monkeypatch.setattr(data, "element_spec", spec)
    monkeypatch.setattr(
        data,
        "train_batches",
        lambda source, **kwargs: Poisoned(original(source, **kwargs), kwargs["start_step"]),
    )


def test_non_finite_step_stops_the_run_with_the_last_good_state(tiny_config, tmp_path, monkeypatch):
    nan_images(monkeypatch, {6, 7, 8})
    config = tiny_config(log__every=5, max_skipped_steps=2)  # The program of the next test.
    with pytest.raises(Diverged, match=r"at step 7 .*the last checkpoint is step 6") as error:
        train(config, str(tmp_path))
    assert "max_skipped_steps" in str(error.value)
    assert not (tmp_path / "DONE").exists()
    for name, array in final_state(config, tmp_path).items():
        assert np.isfinite(array).all(), name


def test_tolerated_non_finite_steps_change_nothing_else(tiny_config, tmp_path, monkeypatch):
    nan_images(monkeypatch, {4, 5, 9})
    config = tiny_config(max_skipped_steps=2)
    train(config, str(tmp_path))
    rows = read_metrics(tmp_path)
    assert [row["train/bad_steps"] for row in rows] == [0, 0, 0, 0, 1, 2, 0, 0, 0, 1, 0, 0]
    state = final_state(config, tmp_path)
    assert state["opt_state.adamw.count"] == 9  # Twelve steps, three of them held back.
    for name, array in state.items():
        assert np.isfinite(array).all(), name


def test_nothing_is_compiled_after_the_first_evaluation(tiny_config, tmp_path, monkeypatch):
    """Neither a step, nor an evaluation, nor a save: JAX tells of each compilation."""
    equal_runs.forget()
    monkeypatch.setattr(equal_runs, "MOST_KEPT", 0)  # Else much is compiled before this run.
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    monitoring.register_event_duration_secs_listener(listen)
    at = []
    log_step = StepLog.step
    monkeypatch.setattr(
        StepLog, "step", lambda self, *args: at.append(len(compiled)) or log_step(self, *args)
    )
    config = tiny_config(total=9, eval__every=3, checkpoint__every=3, log__pictures=False)
    try:
        train(config, str(tmp_path))
    finally:
        monitoring.unregister_event_duration_listener(listen)
    assert at[0] > 0
    assert at[4:] == [at[4]] * 5


@pytest.mark.parametrize(
    ("batch_size", "shape"),
    [
        (7, (8, 1, 1)),
        (64, (1, 2, 4)),
        pytest.param(30, (1, 2, 4), marks=pytest.mark.soak),
        pytest.param(1, (1, 1, 8), marks=pytest.mark.soak),
    ],
)
def test_evaluation_is_exact_for_any_batch_size_and_mesh(
    undisturbed, tiny_config, batch_size, shape
):
    _, workdir = undisturbed
    data_size, fsdp, tensor = shape
    config = tiny_config(
        full=True,
        eval__batch_size=batch_size,
        mesh__data=data_size,
        mesh__fsdp=fsdp,
        mesh__tensor=tensor,
    )
    run = Run.build(config)
    state = Store(workdir / "checkpoints").restore_newest(run.abstract).tree
    found = Evaluator(config, run.task, run.abstract, run.mesh).run(state.params)
    logged = read_metrics(workdir)[-1]
    assert found["val/num_examples"] == 30
    assert found["val/accuracy"] == logged["eval/val/accuracy"]
    assert found["val/top5_accuracy"] == logged["eval/val/top5_accuracy"]
    np.testing.assert_allclose(found["val/loss"], logged["eval/val/loss"], rtol=1e-5)


def test_accuracy_and_probes_equal_a_plain_count(undisturbed, tiny_config):
    _, workdir = undisturbed
    config = tiny_config(eval__probes__split="train[:90%]", eval__probes__neighbors=[5])
    run = Run.build(config)
    state = Store(workdir / "checkpoints").restore_newest(run.abstract).tree
    evaluator = Evaluator(config, run.task, run.abstract, run.mesh)
    images = (np.load(config.data.name)["image"] - 127.5) / np.float32(127.5)
    labels = np.load(config.data.name)["label"]
    params = jax.device_get(state.params)
    logits = jax.jit(run.task.model.apply)({"params": params}, images[270:])
    expected = float((np.asarray(logits).argmax(-1) == labels[270:]).mean())
    found = evaluator.run(state.params)
    assert found["val/accuracy"] == expected
    backbone = run.task.model.backbone
    vector = jax.jit(lambda p, images: backbone.apply({"params": p}, images).vector())
    x = np.asarray(vector(params["backbone"], images), np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similar = x[270:] @ x[:270].T
    votes = np.zeros((len(similar), 10))
    for row, nearest in enumerate(np.argsort(-similar, axis=1)[:, :5]):
        np.add.at(votes[row], labels[:270][nearest], np.exp(similar[row, nearest] / 0.07))
    assert found["val/knn_5"] == pytest.approx((votes.argmax(1) == labels[270:]).mean())
    assert 0 <= found["val/linear"] <= 1


def test_the_best_checkpoint_is_kept_and_every_one_holds_the_best_so_far(tiny_config, tmp_path):
    """Not from the log, which other processes may read while the first one cuts it back."""
    config = tiny_config(checkpoint__keep_best="val/loss", checkpoint__keep_last=1, total=16)
    train(config, str(tmp_path))
    rows = {row["step"]: row.get("eval/val/loss") for row in read_metrics(tmp_path)}
    evaluated = {at: value for at, value in rows.items() if value is not None}
    best = min(evaluated.values())
    store = Store(tmp_path / "checkpoints")
    assert store.steps()[-1] == 16
    assert any(evaluated.get(at) == best for at in store.steps())
    restored = store.restore_newest(Run.build(config).abstract)
    assert restored.metadata["best"] == {"val/loss": best}


def test_an_evaluation_that_is_interrupted_twice_is_still_owed(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(total=6, eval__every=0)

    def abandoned(self, params, **_):
        raise Abandoned

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "run", abandoned)
        for said in ("saved step 6", "its evaluation is not done"):
            with pytest.raises(Interrupted, match=said):
                train(config, str(tmp_path))
            assert not (tmp_path / "DONE").exists()
    assert train(config, str(tmp_path)).results["val/num_examples"] == 30


def test_fewer_steps_than_are_done(undisturbed, tiny_config):
    with pytest.raises(UserError, match=r"is at step 12, and config.total=4 ends before it"):
        train(tiny_config(full=True, total=4), str(undisturbed[1]))


@pytest.mark.soak
def test_the_best_by_a_metric_of_one_class_is_kept(tiny_config, tmp_path, monkeypatch):
    metrics = classification.Task.metrics

    def of_each_class(self, found):
        return {**metrics(self, found), "recall/a/b": metrics(self, found)["accuracy"]}

    monkeypatch.setattr(classification.Task, "metrics", of_each_class)
    monkeypatch.setitem(classification.Task.metric_info, "recall/*", SCORE)
    config = tiny_config(checkpoint__keep_best="val/recall/a/b", checkpoint__keep_last=1, total=16)
    train(config, str(tmp_path))
    name = "eval/val/recall/a/b"
    evaluated = {row["step"]: row[name] for row in read_metrics(tmp_path) if name in row}
    best = max(evaluated.values())
    assert any(evaluated.get(at) == best for at in Store(tmp_path / "checkpoints").steps())


def test_best_by_a_metric_that_does_not_exist(tiny_config, tmp_path):
    config = tiny_config(checkpoint__keep_best="val/acuracy", total=4)
    with pytest.raises(UserError, match="did you mean 'val/accuracy'"):
        train(config, str(tmp_path))


def test_finished_run_is_left_alone(undisturbed):
    config, workdir = undisturbed
    before = (workdir / "metrics.jsonl").read_bytes()
    results = train(config, str(workdir)).results
    assert results["val/num_examples"] == 30
    assert (workdir / "metrics.jsonl").read_bytes() == before


def mean_loss(task, mesh, accum_steps):
    """A compiled `(params, batch, key) → (loss, gradients)`."""

    def mean(params, batch, key):
        return step._loss_and_grads(
            task, lambda x: x, params, batch, key, accum_steps=accum_steps, mesh=mesh
        )

    return jax.jit(mean)


def random_params(run):
    draw = np.random.default_rng(1).normal
    return jax.tree.map(lambda x: draw(0, 0.2, x.shape).astype(np.float32), run.abstract.params)


def test_micro_batches_draw_their_own_dropout(tiny_config, one_device):
    """Two equal halves give different losses under dropout, and one loss without it."""
    run = Run.build(tiny_config(model__dropout=0.5, model__depth=1))
    half = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    # Strided micro-batches: rows 0, 2, ... and 1, 3, ... are the same images.
    batch = {"image": np.repeat(half, 2, axis=0), "label": np.repeat(np.arange(8), 2)}
    key = step.random_key(jax.numpy.uint32(0), step.Purpose.DROPOUT)
    with sharding.activate(run.mesh):
        params = random_params(run)
        soft = jax.jit(run.task.augment)(batch, key)
        parts = [jax.tree.map(lambda x, i=i: x[i::2], soft) for i in range(2)]
        keys = [jax.random.fold_in(key, i) for i in range(2)]
        loss_fn = jax.jit(run.task.loss_fn)
        separate = [loss_fn(params, p, k) for p, k in zip(parts, keys, strict=True)]
        together, _ = mean_loss(run.task, run.mesh, 2)(params, soft, key)
    first, second = (float(total / count) for total, count in separate)
    assert abs(first - second) > 1e-3
    np.testing.assert_allclose(together, (first + second) / 2, rtol=1e-6)


def test_neither_small_class_weights_nor_micro_batches_scale_the_loss(tiny_config, one_device):
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
    batch = {"image": images, "label": np.arange(16) % 10}
    found = []
    for weight, accum_steps in ((1.0, 1), (0.01, 2)):
        small = {"model__depth": 0, "model__position": "none"}
        run = Run.build(tiny_config(task__class_weights=[weight] * 10, **small))
        key = jax.random.key(0)
        with sharding.activate(run.mesh):
            mean = mean_loss(run.task, run.mesh, accum_steps)
            found.append(mean(random_params(run), jax.jit(run.task.augment)(batch, key), key))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *found)


def test_a_single_cpu_gets_the_program_that_is_fast_there(tiny_config):
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), np.uint8)

    def program(devices, **keys):
        run = Run.build(tiny_config(**keys), jax.devices()[:devices])
        with sharding.activate(run.mesh):
            lowered = jax.jit(run.task.predict).lower(run.abstract.params, {"image": images})
        return lowered.as_text()

    fast = {"model__unroll": 0, "model__attention": "heads_first"}
    plain = {"model__unroll": 1, "model__attention": "xla"}
    assert program(1) == program(1, **fast) != program(1, **plain)
    assert program(2) == program(2, **plain)
