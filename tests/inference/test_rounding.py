"""Programs with rounded weights: their limits, and their agreement with the model on digits."""

import types

import jax
import numpy as np
import pytest

import vit_jax
from vit_jax import tasks
from vit_jax.checkpoints.input_spec import InputSpec
from vit_jax.errors import WrongExport
from vit_jax.inference import export as export_lib
from vit_jax.inference import program as program_lib
from vit_jax.inference.agreement import NotMeasured, of_first_split
from vit_jax.inference.predict import Predictor
from vit_jax.inference.preparation import ByInputSpec
from vit_jax.types import ArraySpec, DataInfo

INT = np.dtype(np.int32)


def classifier_of(config, images, labels):
    """A predictor with a random backbone and the ridge regression of its features on classes."""
    spec = {"image": ArraySpec(images.shape[1:], images.dtype), "label": ArraySpec((), INT)}
    info = DataInfo(spec, 10, None)
    task = tasks.build(config.task, config.model, info)
    rng = np.random.default_rng(0)

    def drawn(path, x):
        is_norm = "scale" in jax.tree_util.keystr(path)
        return np.ones(x.shape, np.float32) if is_norm else rng.normal(0, 0.1, x.shape).astype("f")

    params = jax.tree_util.tree_map_with_path(drawn, tasks.abstract_params(task))
    predictor = Predictor(task, params, info, ByInputSpec(InputSpec(size=(8, 8)), 1))
    embed = program_lib.build(predictor, outputs="features", include_preprocessing=True)
    vectors = np.pad(embed(images)["features"], ((0, 0), (0, 1)), constant_values=1.0)
    ridge = 1e-2 * len(images) * np.eye(vectors.shape[1], dtype=np.float32)
    wanted = np.eye(10, dtype=np.float32)[labels]
    found = np.linalg.solve(vectors.T @ vectors + ridge, vectors.T @ wanted)
    params["head"] = {"kernel": found[:-1], "bias": found[-1]}
    return predictor, (vectors @ found).argmax(1)


def test_int8_weights_keep_the_classes_of_the_digits(
    tiny_config, digits_npz, left_by_a_run, tmp_path
):
    config = tiny_config(eval__sets__val__split="train", model__width=64, model__depth=1)
    left_by_a_run(config, tmp_path / "run", image=((8, 8, 1), np.uint8), classes=10)
    with np.load(digits_npz) as stored:
        images, labels = stored["image"], stored["label"]
    predictor, predicted = classifier_of(config, images, labels)
    assert (predicted == labels).mean() > 0.9
    done = vit_jax.export(
        predictor, tmp_path / "out", weights="int8", images=images[:8], workdir=tmp_path / "run"
    )
    assert done.agreement.total == 300
    assert 1e-4 < done.rounding < 0.05
    assert "of their largest value (limit: 0.25)\n" in str(done)
    assert str(done).endswith(str(done.agreement))


@pytest.mark.parametrize(("weights", "limit"), export_lib.ROUNDING.items())
def test_a_program_that_rounding_breaks_is_refused(weights, limit):
    def check(rounding, kind=np.float32):
        program = types.SimpleNamespace(weights_as=weights, outputs={"x": np.zeros(1, kind)})
        return export_lib._check_rounding(program, rounding)

    assert check(limit) == {"rounding": limit, "limit": limit}
    for rounding in (1.01 * limit, np.nan):
        with pytest.raises(WrongExport, match=f"rounding the weights to {weights} .* than {limit}"):
            check(rounding)
    assert check(1.0, np.int32) == {"rounding": 1.0, "limit": None}  # Such as a label map.


def test_an_agreement_that_was_not_measured_says_why():
    program = types.SimpleNamespace(outputs={"features": np.zeros((1, 2))})
    with pytest.raises(NotMeasured, match=r"^the outputs are no scores of classes$"):
        of_first_split(None, None, None, program, None)
    told = export_lib._agreement("", None, None, (None, None))
    done = export_lib.Exported("out", "ONNX", 1, 0.0, 0.0, 1, 1, 0.0, 0.01, None, **told)
    assert "by at most 1.0e-02 of their largest value (no limit, because the outputs" in str(done)
    assert str(done).endswith(
        "agreement was not measured: it needs a run, whose evaluation split has the images"
    )
