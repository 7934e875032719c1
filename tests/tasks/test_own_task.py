"""A task from outside the package trains and evaluates through the same loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import config as config_lib
from vit_jax import tasks
from vit_jax.checkpoints.store import Store
from vit_jax.errors import UserError
from vit_jax.inference.predict import Predictor
from vit_jax.tasks import BaseTask
from vit_jax.tracking import read_metrics
from vit_jax.training import evaluate
from vit_jax.training.loop import train
from vit_jax.training.run import Run
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec, DataInfo

INFO = DataInfo({"image": ArraySpec((8, 8, 1), np.dtype(np.uint8))}, 10)
TINY = {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4, "num_classes": 1}


@pytest.fixture
def regress(tiny_config, monkeypatch):
    """`regress(module, **fields)`: a run of the task in that file of this folder."""
    monkeypatch.syspath_prepend(__file__.rsplit("/", 1)[0])

    def make(module, **fields):
        config = tiny_config(total=6, log__pictures=True)
        config.unlock()
        config.task = {"name": f"{module}:Task", "scale": 9.0, **fields}
        return config_lib.validate(config)

    return make


def test_an_own_task_takes_the_whole_way(regress, tmp_path, drawing_reports, one_device):
    with drawing_reports():
        outcome = train(regress("regression"), str(tmp_path))
    assert outcome.headline[0] == "val_ema/rank_correlation"
    assert outcome.results["val/num_examples"] == 30
    # Examples, not batches, are what metrics see: the last batch of each size is part padding.
    again = evaluate.evaluate_workdir(Workdir.existing(str(tmp_path)), {"eval.batch_size": "32"})
    for name, value in outcome.results.items():
        assert again[name] == pytest.approx(value, rel=1e-5), name
    predictor = Predictor.from_workdir(str(tmp_path))
    found = predictor.predict(np.zeros((2, 8, 8, 1), np.uint8))
    lines = predictor.task.result_lines(found, 3)
    assert [len(each) for each in lines] == [1, 1]
    assert f"{found['value'][0]:.1f}" in lines[0][0]
    assert (tmp_path / "report.html").exists()


@pytest.mark.soak
def test_earlier_names_of_methods_are_the_same_task(regress):
    """Also with adapters, which replace two of the methods."""
    states = []
    for module in ("regression", "earlier_regression"):
        run = Run.build(regress(module, lora={"rank": 1}))
        with run.open_feed(0) as feed:
            state, _ = run.compile_step()(run.make_state(), feed.next_batch())
        states.append(jax.device_get(state.params))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_task_has_the_augmentation_whose_fields_it_declares(regress):
    fields = {"name": "regression:Task", "scale": 9.0}
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8),
        "label": np.arange(4.0, dtype=np.float32),
    }
    info = INFO._replace(spec={k: ArraySpec(x.shape[1:], x.dtype) for k, x in batch.items()})
    plain = tasks.build(fields, TINY, info).augment(batch, jax.random.key(0))
    np.testing.assert_array_equal(plain["label"], batch["label"])
    mixed = tasks.build({**fields, "mixup": 0.5}, TINY, info).augment(batch, jax.random.key(0))
    share = (mixed["label"][1:] - plain["label"][:-1]).mean()
    assert 0.5 <= share < 1
    expected = share * plain["image"] + (1 - share) * jnp.roll(plain["image"], 1, 0)
    np.testing.assert_allclose(mixed["image"], expected, atol=1e-6)
    with pytest.raises(UserError, match=r"mixup=-1.0: write 0 or more"):
        tasks.build({**fields, "mixup": -1.0}, TINY, info)
    with pytest.raises(UserError, match="cutmix is no field of task"):
        tasks.build({**fields, "cutmix": 1.0}, TINY, info)


@dataclasses.dataclass(frozen=True)
class Smallest(BaseTask):
    """A task that defines what it must, and nothing else."""

    headline = "mean"

    def loss_fn(self, params, batch, key):
        del key
        found = self.model.apply({"params": params}, batch["image"])
        return found.sum(), jnp.float32(len(found))

    def predict(self, params, batch):
        return {"value": self.model.apply({"params": params}, self.inputs(batch))}

    def eval_sums(self, params, batch):
        found = self.predict(params, batch)["value"][:, 0] * batch["mask"]
        return {"sum": found.sum(), "examples": batch["mask"].sum()}

    def metrics(self, found):
        return {"mean": float(found["sum"] / found["examples"])}


def test_the_rest_of_a_task_has_defaults():
    task = tasks.build({"name": f"{__name__}:Smallest", "mean": [0.0], "std": [255.0]}, TINY, INFO)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), tasks.abstract_params(task))
    batch = task.augment({"image": np.full((2, 8, 8, 1), 255, np.uint8)}, jax.random.key(0))
    np.testing.assert_array_equal(batch["image"], np.ones((2, 8, 8, 1)))
    assert task.loss_fn(params, batch, jax.random.key(0))[1] == 2
    assert task.frozen(params, ["x"]) == ["x"]
    assert task.inference_params(params) is params
    examples = {"image": np.zeros((2, 8, 8, 1), np.uint8), "value": np.float32([[0.5], [1.25]])}
    assert task.result_lines(examples, 5) == [["value: [0.5]"], ["value: [1.25]"]]
    assert task.summaries(examples) == ["value: [0.5]", "value: [1.25]"]
    np.testing.assert_array_equal(task.pictures(examples), examples["image"])
    assert task.sections(examples) == []
    with pytest.raises(UserError, match="--text is for runs that learned images and texts"):
        task.with_texts(["a"])


@dataclasses.dataclass
class Unfinished:
    """Lacks most of what a task must define."""

    headline = "x"

    def predict(self, params, batch):
        return {}


@dataclasses.dataclass(frozen=True)
class HalfRenamed(Smallest):
    """Would train by the loss of its base class, whatever its own method says."""

    def objective(self, params, batch, key):
        raise AssertionError


def test_an_earlier_name_that_nothing_would_call_is_refused():
    with pytest.raises(UserError, match="defines objective; it is called loss_fn now"):
        tasks.build({"name": f"{__name__}:HalfRenamed"}, TINY, INFO)


def test_what_a_task_lacks_is_named():
    with pytest.raises(UserError, match="not define eval_sums, loss_fn, metrics"):
        tasks.build({"name": f"{__name__}:Unfinished"}, TINY, INFO)
    spec = {"image": ArraySpec((7, 8, 1), np.dtype(np.uint8))}
    with pytest.raises(UserError, match="patch_size=4 does not divide the image of 7×8"):
        tasks.build({"name": f"{__name__}:Smallest"}, TINY, INFO._replace(spec=spec))
    for shape, crop in (((3, 8, 1), True), ((0, 0, 1), False)):
        spec = {"image": ArraySpec(shape, np.dtype(np.uint8))}
        task = {"name": f"{__name__}:Smallest", "crop_to_patches": crop}
        with pytest.raises(UserError, match=f"{shape[0]}×{shape[1]} pixels; the model needs 4×4"):
            tasks.build(task, TINY, INFO._replace(spec=spec))
    with pytest.raises(UserError, match="the data has no images"):
        tasks.build({"name": f"{__name__}:Smallest"}, TINY, INFO._replace(spec={}))


@pytest.mark.soak
def test_the_lowest_is_kept_where_an_own_task_says_that_lower_is_better(regress, tmp_path):
    config = regress("regression")
    config.unlock()
    config.checkpoint.keep_best, config.checkpoint.keep_last = "val/rmse", 1
    config.eval.every, config.optim.lr, config.total = 1, 0.3, 8
    outcome = train(config_lib.validate(config), str(tmp_path))
    rmse = {row["step"]: row["eval/val/rmse"] for row in read_metrics(tmp_path) if row["step"]}
    best = min(rmse, key=rmse.get)
    assert best < 8  # Else the newest would be kept anyhow.
    assert Store(tmp_path / "checkpoints").steps() == [best, 8]
    assert outcome.describe().count("%") == 0  # A rank correlation is no percentage.


def test_an_own_task_that_declares_nothing_is_asked_for_the_direction(
    regress, tmp_path, monkeypatch
):
    import regression

    monkeypatch.delattr(regression.Task, "metric_info")
    config = regress("regression")
    config.unlock()
    config.checkpoint.keep_best = "val/rmse"
    with pytest.raises(UserError, match="best_is=highest or lowest"):
        train(config_lib.validate(config), str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()
