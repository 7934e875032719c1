"""Low-rank adapters: the product, what is trained, and the way out to other codebases' files."""

import json
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure
from PIL import Image

from vit_jax import attention, checkpoints, models, tasks
from vit_jax.checkpoints.store import Store, flatten
from vit_jax.config import load, set_key, validate
from vit_jax.errors import UserError
from vit_jax.inference.predict import Predictor
from vit_jax.models import lora
from vit_jax.training import initial_state
from vit_jax.training.evaluate import evaluate_checkpoint
from vit_jax.training.loop import train
from vit_jax.training.run import Run


def with_keys(config, **keys):
    """A validated copy of `config` with keys set, dots written as double underscores."""
    config = config.copy_and_resolve_references()
    config.unlock()
    for key, value in keys.items():
        set_key(config, key.replace("__", "."), value)
    return validate(config)


@pytest.fixture(scope="module")
def plain(request, digits_npz):
    return load(f"{request.config.rootpath}/tests/tiny.py:{digits_npz}")


@pytest.fixture(scope="module")
def config(plain):
    """A run that trains adapters of rank 2 on a 2×2×2 mesh.

    The head leaves zero at the second step, `up` at the third, `down` at the fourth.
    """
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    return with_keys(plain, task__lora__rank=2, total=4, ema_decay=0.0, **mesh)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapted")
    train(config, str(workdir))
    return workdir


def flat(tree):
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}


def dense_product(down, up, kernel):
    """down · up as matrices, layer by layer."""
    if down.ndim + up.ndim - 2 > kernel.ndim:
        return np.stack([dense_product(*each) for each in zip(down, up, kernel, strict=True)])
    return (down.reshape(-1, down.shape[-1]) @ up.reshape(up.shape[0], -1)).reshape(kernel.shape)


@pytest.mark.parametrize("scan", [True, False])
def test_merged_kernels_are_the_kernels_plus_the_products(scan):
    model = models.build(
        "vit", patch_size=4, width=16, depth=2, num_heads=2, num_classes=3, scan=scan
    )
    key, images = jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    boxed = jax.eval_shape(model.init, key, images)["params"]
    random = np.random.default_rng(0)

    def noise(shapes):
        return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)

    def start(key):
        return nn.unbox(lora.init(key, boxed, rank=3, targets=lora.ATTENTION_AND_MLP))

    base, factors = noise(nn.unbox(boxed)), jax.jit(start)(key)
    unchanged = flat(lora.merge({**base, "lora": factors}))
    for name, expected in flat(base).items():
        np.testing.assert_array_equal(unchanged[name], expected, err_msg=name)

    factors = noise(factors)
    merged, pairs = flat(lora.merge({**base, "lora": factors})), flat(factors)
    changed = {name.rpartition("/")[0] for name in pairs}
    assert len(changed) == 6 if scan else 12  # query, key, value, out, dense1, dense2
    for name, kernel in flat(base).items():
        product = 0
        if name in changed:
            product = dense_product(pairs[f"{name}/down"], pairs[f"{name}/up"], kernel)
        np.testing.assert_allclose(merged[name], kernel + product, atol=1e-5, err_msg=name)


def test_shapes_divide_kernels_at_the_embedding(config):
    shapes = tasks.abstract_params(Run.build(config).task)["lora"]["backbone"]["blocks"]
    assert shapes["attn"]["query"]["kernel"]["down"].shape == (2, 16, 2)
    assert shapes["attn"]["query"]["kernel"]["up"].shape == (2, 2, 2, 8)
    assert shapes["attn"]["out"]["kernel"]["down"].shape == (2, 2, 8, 2)
    assert shapes["attn"]["out"]["kernel"]["up"].shape == (2, 2, 16)


def test_training_changes_adapters_and_head_alone(config, trained):
    run = Run.build(config)
    before = flat(jax.device_get(run.make_state().params))
    restored = Store(trained / "checkpoints").restore_newest(run.abstract)
    after = flat(jax.device_get(restored.tree.params))
    for name in before:
        changed = name.startswith(("lora/", "head/"))
        assert np.array_equal(before[name], after[name]) != changed, name
    moments = [name for name in flatten(run.abstract.opt_state) if "backbone" in name]
    assert moments
    assert all("lora.backbone" in name for name in moments)


def test_what_is_shown_and_exported_is_the_merged_model(trained, tmp_path, digits_npz):
    """`predict` with attention, and a file for others, see what was trained."""
    predictor = Predictor.from_workdir(str(trained))
    images = np.load(digits_npz)["image"][:2]
    expected = predictor.predict(images)["probability"]
    model = predictor.task.model
    checkpoints.save(lora.merge(predictor.params), model, tmp_path / "out.npz", "npz")
    params = checkpoints.load(tmp_path / "out.npz", model)
    inputs = (images - 127.5) / np.float32(127.5)
    logits = jax.jit(model.apply)({"params": params}, inputs)
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=1e-6)

    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attention_maps", lambda model, params, _: seen.update(params))
        patch.setattr(attention, "panel", lambda *_: Figure())
        predictor.draw_attention(*predictor.answers(images), str(tmp_path / "looked.png"))
    np.testing.assert_allclose(
        flat(seen)["backbone/blocks/mlp/dense1/kernel"],
        params["backbone"]["blocks"]["mlp"]["dense1"]["kernel"],
        atol=1e-6,
    )
    for few in (images[:1], images):
        predictor.draw_attention(*predictor.answers(few), str(tmp_path / "looked.png"))
        assert min(Image.open(tmp_path / "looked.png").size) > 100


def test_adapters_start_from_a_checkpoint(plain, config, tmp_path):
    base = Run.build(plain)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: random.normal(0, 0.1, x.shape).astype(np.float32), base.abstract.params
    )
    checkpoints.save(params, base.task.model, tmp_path / "base.npz", "npz")
    run = Run.build(with_keys(config, init__checkpoint=str(tmp_path / "base.npz")))
    state, _ = initial_state.first_state(run)
    for name, expected in flat(params).items():
        np.testing.assert_array_equal(flat(state.params)[name], expected, err_msg=name)
    assert flat(state.params)["lora/backbone/blocks/mlp/dense1/kernel/down"].any()


def test_towers_are_frozen_where_they_are_adapted():
    kernel = {"blocks": {"attn": {"query": {"kernel": {"down": 0, "up": 0}}}}}
    image, both = {"backbone": kernel}, {"backbone": kernel, "text": kernel}
    assert len(lora.frozen({"lora": image})) == 1
    patterns = lora.frozen({"lora": both})

    def is_frozen(name):
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    for name in ("backbone/patch_embed/kernel", "text/token_embed", "text/blocks/mlp/dense1/bias"):
        assert is_frozen(name), name
    for name in ("head/kernel", "scale", "text_head/kernel", "lora/text/blocks/attn/x/down"):
        assert not is_frozen(name), name


def test_a_checkpoint_is_evaluated_without_adapters(plain, config, tmp_path):
    base = Run.build(plain)
    draw = np.random.default_rng(0).normal
    shapes = base.abstract.params
    params = jax.tree.map(lambda x: draw(0, 0.1, x.shape).astype(np.float32), shapes)
    checkpoints.save(params, base.task.model, tmp_path / "base.npz", "npz")
    found = evaluate_checkpoint(config, str(tmp_path / "base.npz"))
    alone = evaluate_checkpoint(plain, str(tmp_path / "base.npz"))
    # The calibration error is a difference, here of equal numbers: rounding of float32 is left.
    assert found == pytest.approx(alone, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task__lora__rank": 0}, "lora.rank=0"),
        ({"task__lora__rank": 16}, "lora.rank=16: .* is 16×16"),
        ({"task__lora__rank": "8"}, "write a whole number"),
        ({"task__lora__rnk": 8}, "did you mean 'rank'"),
        ({"task__lora__targets": "qkv/.*"}, "matches no whole name; kernels are called backbone/"),
    ],
)
def test_impossible_adapters_are_user_errors(config, keys, message):
    with pytest.raises(UserError, match=message):
        Run.build(with_keys(config, **keys))


def test_adapters_cannot_change_on_resume(config, trained):
    record = json.loads((trained / "config.json").read_text())
    assert record["config"]["task"]["lora"] == {"rank": 2}
    with pytest.raises(UserError, match=r"task\.lora\.rank: 2 → 4"):
        train(with_keys(config, task__lora__rank=4), str(trained))
