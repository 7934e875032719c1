"""The same weights get the same metrics by every route: training, both evaluations, prediction."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from vit_jax import checkpoints, config, models
from vit_jax.inference.predict import Predictor
from vit_jax.training.evaluate import evaluate_checkpoint, evaluate_workdir, open_split
from vit_jax.training.loop import train
from vit_jax.training.workdir import Workdir

TEACHER = {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    model = models.build(**TEACHER, num_classes=10)
    init = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.1, np.float32), nn.unbox(init)["params"])
    path = tmp_path_factory.mktemp("teacher") / "teacher.npz"
    checkpoints.save(params, model, path, "npz")
    return str(path)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "kind",
    ["distilled", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("plain", "adapted"))],
)
def test_every_route_gives_the_same_metrics(kind, tiny_config, teacher_file, tmp_path):
    keys = {"ema_decay": 0.0, "total": 4, "optim__lr": 0.1, "model__head_zero_init": False}
    keys["model__depth"] = 1
    if kind == "adapted":
        keys |= {"task__lora": {"rank": 2}}
    if kind == "distilled":
        distill = {"model": TEACHER, "checkpoint": teacher_file}
        keys |= {"task__distill": distill, "model__distill_token": True}
    settings = tiny_config(**keys)
    trained = train(settings, str(tmp_path)).results
    routes = {
        "workdir": evaluate_workdir(Workdir.existing(str(tmp_path)), {"eval.batch_size": "7"}),
        "checkpoint": evaluate_checkpoint(settings, str(tmp_path)),
    }
    if kind == "distilled":
        # Whoever evaluates a distilled model need not have its teacher.
        alone = settings.copy_and_resolve_references()
        alone.unlock()
        del alone.task["distill"]
        routes["without its teacher"] = evaluate_checkpoint(config.validate(alone), str(tmp_path))
    for route, found in routes.items():
        assert found.keys() == trained.keys(), route
        for name, value in trained.items():
            # The calibration error may be zero but for rounding.
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), (route, name)

    source = open_split(settings, "val").source
    records = source.fetch(np.arange(len(source)))
    probability = Predictor.from_workdir(str(tmp_path)).predict(records["image"])["probability"]
    labels = records["label"]
    assert np.mean(probability.argmax(1) == labels) == pytest.approx(trained["val/accuracy"])
    best = np.argsort(-probability, axis=1)[:, :5]
    top5 = np.mean((best == labels[:, None]).any(1))
    assert top5 == pytest.approx(trained["val/top5_accuracy"])
    loss = -np.log(probability[np.arange(len(labels)), labels]).mean()
    assert loss == pytest.approx(trained["val/loss"], rel=1e-4)
