"""Self-supervised methods as a run has them: pipeline, step and evaluation; what they refuse."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from self_supervised_tiny import METHODS, MODEL, info, model_of

from vit_jax import tasks
from vit_jax.errors import UserError
from vit_jax.training.loop import train
from vit_jax.training.run import Run
from vit_jax.types import ArraySpec, DataInfo


@pytest.mark.parametrize("method", METHODS)
def test_the_step_of_a_run_takes_the_batches_of_its_feed(method, method_config, one_device):
    run = Run.build(method_config(method))
    (_, wanted), _ = run.trace_step().args_info
    with run.open_feed(0) as feed:
        batch = feed.next_batch()
    told = [{name: (x.shape, x.dtype) for name, x in of.items()} for of in (batch, wanted)]
    assert told[0] == told[1]
    assert all(x.dtype == np.uint8 for name, x in batch.items() if name != "label")


def checksums(workdir):
    manifest = json.loads((workdir / "checkpoints/4/manifest/metadata").read_text())
    return {name: entry["checksum"] for name, entry in manifest["arrays"].items()}


@pytest.mark.soak
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_two_halves_is_the_whole_run_bit_for_bit(method, method_config, tmp_path):
    config = method_config(method, checkpoint__every=2)
    outcome = train(config, str(tmp_path))
    assert np.isfinite(list(outcome.results.values())).all()
    whole = checksums(tmp_path)
    assert any(name.startswith("task_state.teacher") for name in whole) == (
        method not in ("masked", "simmim")
    )
    (tmp_path / "DONE").unlink()
    shutil.rmtree(tmp_path / "checkpoints/4")
    train(config, str(tmp_path))
    assert checksums(tmp_path) == whole


@pytest.mark.parametrize("method", ["simmim", "ijepa"])
def test_the_result_for_an_image_does_not_depend_on_its_row(method):
    task = tasks.build({"name": method, **METHODS[method]}, model_of(method), info())
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: draw.normal(size=x.shape).astype(np.float32), tasks.abstract_params(task)
    )
    images = draw.integers(0, 256, (1, 8, 8, 3), np.uint8).repeat(3, axis=0)
    found = jax.jit(task.predict)(params, {"image": images})
    for errors in found.values():
        np.testing.assert_allclose(errors, errors[:1].repeat(3, axis=0), rtol=1e-5)


class Fake:
    """A network that answers with numbers by hand."""

    def __init__(self, model, answer):
        self.backbone, self.answer = model.backbone, answer

    def apply(self, variables, images, *_, **__):
        return self.answer(images)


def build(method, **fields):
    return tasks.build({"name": method, **METHODS[method], **fields}, model_of(method), info())


@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_rows_that_only_fill_a_batch_do_not_count(method):
    task = build(method)
    features = np.array([[2, 0], [0, 3], [5, 5], [0.6, 0.8]], np.float32)
    fake = Fake(task.model, lambda images: types.SimpleNamespace(pooled=features))
    task = dataclasses.replace(task, model=fake)
    batch = {"image": np.zeros((4, 8, 8, 3), np.uint8), "mask": np.array([1.0, 1, 0, 1])}
    sums = jax.device_get(task.eval_sums({}, batch))
    assert sums["examples"] == 3
    np.testing.assert_allclose(sums["feature"], [1.6, 1.8], rtol=1e-6)
    # Cosines of the pairs: 0, 0.6 and 0.8.
    assert task.metrics(sums)["feature_distance"] == pytest.approx(1 - 1.4 / 3)


@pytest.mark.parametrize(
    ("method", "fields", "error"), [("masked", {"norm_pixels": False}, 9.0), ("simmim", {}, 3.0)]
)
def test_the_error_is_the_mean_over_what_was_removed(method, fields, error):
    """White images, 1 everywhere, of which -2 is said: not the mean over all pixels."""
    task = build(method, **fields)

    def answer(images):
        if method == "simmim":
            return jnp.full(images.shape, -2.0)
        return types.SimpleNamespace(pixels=jnp.full((2, 16, 2 * 2 * 3), -2.0))

    task = dataclasses.replace(task, model=Fake(task.model, answer))
    found = task.predict({}, {"image": np.full((2, 8, 8, 3), 255, np.uint8)})
    np.testing.assert_allclose(found["error"], [error, error], rtol=1e-6)
    rebuilt = np.asarray(found["reconstructed" if method == "masked" else "rebuilt"])
    assert set(np.unique(rebuilt)) == {0, 255}  # What is removed is as said, the rest as it was.


@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_large_and_small_crops_drop_by_keys_of_their_own(method, monkeypatch):
    keys = []

    def record(self, params, crops, masked=None, key=None):
        keys.append(np.asarray(jax.random.key_data(key)))
        if len(keys) == 2:
            raise InterruptedError
        return types.SimpleNamespace(pooled=None)

    task = build(method)
    monkeypatch.setattr(type(task), "encode", record)
    with pytest.raises(InterruptedError):
        task.loss_fn({}, dict.fromkeys(("global", "local", "masked")), jax.random.key(0))
    assert (keys[0] != keys[1]).any()


def test_koleo_refuses_micro_batches_when_the_run_is_built(method_config, one_device):
    with pytest.raises(UserError, match="KoLeo compares all examples"):
        Run.build(method_config("dinov2", task__koleo_weight=0.1, accum_steps=2))


@pytest.mark.parametrize("method", METHODS)
def test_models_that_are_more_than_a_backbone_are_refused(method):
    task = {"name": method, **METHODS[method]}
    for fields in ({"num_classes": 3}, {"patch_drop": 0.5}):
        with pytest.raises(UserError, match=f"{method}' pre-trains a ViT alone"):
            tasks.build(task, {**model_of(method), **fields}, info())


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_that_would_see_hidden_patches_are_refused(method):
    stem = {"name": "conv_stem", "stem_strides": (1,), "stem_kernel": 3, "stem_width": 8}
    given = {"name": method, **METHODS[method]}, {**model_of(method), **stem}, info()
    if method == "dino":
        assert tasks.build(*given).hides_patches is False
    else:
        with pytest.raises(UserError, match=f"'{method}' hides patches of pixels, but"):
            tasks.build(*given)


@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_crops_and_schedules_that_cannot_be_are_refused(method):
    task = {"name": method, **METHODS[method]}
    with pytest.raises(UserError, match="does not divide the image of 5×5"):
        tasks.build(task, MODEL, info(local=5))
    for field, pair in {"momentum": [0.0, 1.0], "temperature": [0.04, 0.0]}.items():
        with pytest.raises(UserError, match=f"{field}=0.0: write a number above 0"):
            tasks.build({**task, field: pair}, MODEL, info())


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("simmim", {"cell": 0}, "task.cell=0: write a multiple of the patch"),
        ("simmim", {"cell": -4}, "task.cell=-4: write 0 or more"),
        ("masked", {"decoder": {"width": "x"}}, "task.decoder.width='x': write a whole number"),
        ("masked", {"decoder": {"dropout": float("nan")}}, "task.decoder.dropout=nan: write a num"),
        ("ijepa", {"target_scale": [-1.0, 2.0]}, "target_scale=.*above 0, at most 1, the lower"),
        ("ijepa", {"target_aspect": [0.0, 1.0]}, "target_aspect=.*write two numbers above 0"),
        ("ijepa", {"num_targets": 0}, "num_targets=0: write a number above 0"),
        ("ijepa", {"stretch": -1.0}, r"stretch=-1: write 1 or more"),
        ("ijepa", {"momentum": [0.9, 1.5]}, r"momentum=1.5: write a number from 0 to 1"),
        ("ijepa", {"num_steps": 5}, "task.num_steps is no field of task 'ijepa'"),
        ("dino", {"epoch_steps": 5}, "task.epoch_steps is no field of task 'dino'"),
        ("dino", {"head_bottleneck": 0}, "bottleneck=0: write 1 or more"),
        ("dino", {"head_depth": 2**31}, "depth=2147483648: a head has at most 100 layers"),
        ("dino", {"num_prototypes": 2**40}, "num_prototypes=1099511627776: write a whole number"),
        ("dino", {"center_momentum": 2.0}, r"center_momentum=2.0: write a number from 0 to 1"),
        ("dinov2", {"warmup_steps": 5}, "task.warmup_steps is no field of task 'dinov2'"),
        ("dinov2", {"mask_block": 0.0}, r"mask_block=0.0: write a number above 0"),
        ("dinov2", {"ibot_weight": -1.0}, r"ibot_weight=-1.0: write 0 or more"),
    ],
)
def test_fields_that_no_method_can_use_are_named(method, fields, message):
    with pytest.raises(UserError, match=message):
        tasks.build({"name": method, **METHODS[method], **fields}, model_of(method), info())


def test_a_patch_of_one_number_has_no_variance():
    spec = {"image": ArraySpec((4, 4, 1), np.dtype(np.uint8))}
    task, model = {"name": "masked", **METHODS["masked"]}, {**MODEL, "patch_size": 1}
    with pytest.raises(UserError, match="a patch of one number has no variance"):
        tasks.build(task, model, DataInfo(spec, 0))
    tasks.build({**task, "norm_pixels": False}, model, DataInfo(spec, 0))


def test_rows_that_fill_no_patch_are_left_out_of_reconstructions():
    spec = {"image": ArraySpec((9, 8, 3), np.dtype(np.float32))}
    task = {"name": "masked", "crop_to_patches": True, **METHODS["masked"]}
    task = tasks.build(task, MODEL, DataInfo(spec, 0))
    whole, rebuilt = np.zeros((1, 9, 8, 3)), np.zeros((1, 8, 8, 3))
    (picture,) = task.pictures({"image": whole, "masked": rebuilt, "reconstructed": rebuilt})
    assert picture.shape == (8, 24, 3)


def test_float_images_are_shown_in_the_range_that_the_pipeline_chose():
    images = np.linspace(-2, 2, 4 * 8 * 8 * 3, dtype=np.float32).reshape(4, 8, 8, 3)
    for dtype in (np.float32, np.uint8):
        spec = {"image": ArraySpec((8, 8, 3), np.dtype(dtype))}
        task = tasks.build({"name": "simmim", "cell": 4}, MODEL, DataInfo(spec, 0))
        shown = task.shown(images)
        assert shown.dtype == dtype
    assert (shown[0] == 0).all()
