"""Mixer, BiT, hybrids and text towers: what every family owes, and what is each one's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_trees import random_params

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models.conv_stem import PatchStem
from vit_jax.models.layers.initialization import SCHEMES
from vit_jax.models.resnet import BIT, StdConv

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 64, 64, 3)).astype(np.float32)
SMALL_IMAGES = IMAGES[:, :12, :16]
TOKENS = RNG.integers(0, 20, size=(2, 6))
TRANSFORMER = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48}
MIXING = {"patch_size": 4, "tokens_mlp_dim": 8, "channels_mlp_dim": 48}

FAMILIES = {
    "mixer": ("mixer_s16", {"width": 32, "depth": 2, **MIXING}, SMALL_IMAGES),
    "bit": ("bit_r50x1", {"stages": (1, 2), "width_factor": 0.5}, IMAGES),
    "hybrid": ("r26_s32", {**TRANSFORMER, "stages": (1, 1), "width_factor": 0.5}, IMAGES),
    "conv_stem": (
        "conv_stem_b16",
        {**TRANSFORMER, "depth": 1, "stem_strides": (2, 2), "stem_width": 4},
        IMAGES[:, :16, :24],
    ),
    "overlapping_stem": (
        "conv_stem_b16",
        {**TRANSFORMER, "depth": 1, "stem_strides": (2, 1), "stem_width": 4}
        | {"stem_kernel": 3, "stem_norm": True},
        IMAGES[:, :8, :12],
    ),
    "differential": ("vit", {**TRANSFORMER, "patch_size": 4, "differential": True}, SMALL_IMAGES),
    "text": ("text", {**TRANSFORMER, "vocab_size": 20}, TOKENS),
    "bert": ("bert_base", {**TRANSFORMER, "vocab_size": 20, "max_length": 8}, TOKENS),
    "text_map": ("text", {**TRANSFORMER, "vocab_size": 20, "pooling": "map"}, TOKENS),
}


def build(family, num_classes=3, **overrides):
    name, fields, inputs = FAMILIES[family]
    model = models.build(name, num_classes=num_classes, **{**fields, **overrides})
    return model, random_params(model, inputs), inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_every_parameter(family):
    model, params, inputs = build(family)
    loss = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, inputs) ** 2)))
    for path, grad in jax.tree_util.tree_leaves_with_path(loss(params)):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" in name or "['token_mixing']['dense2']['bias']" in name:
            # Softmax does not see the one; the other shifts all channels of a token alike, which
            # every norm after it takes away.
            continue
        layers = np.asarray(grad) if "blocks" in name else np.asarray(grad)[None]
        assert np.all(np.abs(layers).reshape(len(layers), -1).max(axis=1) > 1e-7), name


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_named_and_stay_in_float32(family):
    model, _, inputs = build(family, dtype="bfloat16")
    boxed = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    for box in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert len(box.names) == box.value.ndim
        assert box.value.dtype == jnp.float32
    logits = jax.eval_shape(model.apply, {"params": nn.meta.unbox(boxed)}, inputs)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("family", ["mixer", "text", "bert"])
def test_unscanned_blocks_and_remat_compute_the_same(family):
    model, params, inputs = build(family)
    expected = jax.jit(model.apply)({"params": params}, inputs)
    other, _, _ = build(family, scan=False, remat="full")
    actual = jax.jit(other.apply)({"params": models.unstack_blocks(params)}, inputs)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_convolutions_of_an_overlapping_stem_see_their_neighbors():
    """One pixel reaches the cells of the map whose kernels of three cover it, and no others."""
    stem = PatchStem((2, 1), 4, 3, False, jnp.float32)
    images = np.zeros((1, 16, 16, 1), np.float32)
    params = stem.init(jax.random.key(0), images)["params"]
    quiet = stem.apply({"params": params}, images)
    images[0, 8, 4] = 1
    changed = np.abs(np.asarray(stem.apply({"params": params}, images) - quiet)[0]).max(-1) > 1e-6
    assert changed.shape == (8, 8)
    expected = np.zeros((8, 8), bool)
    expected[3:6, 1:4] = True
    np.testing.assert_array_equal(changed, expected)
    wider = jnp.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=1)
    assert stem.apply({"params": params}, wider).shape == quiet.shape
    with pytest.raises(UserError, match="stem_kernel=2: write an odd number"):
        build("conv_stem", stem_kernel=2)


def test_mixer_noise_in_training_alone():
    model, params, inputs = build("mixer", drop_path=0.5, dropout=0.2)
    calm = jax.jit(model.apply)({"params": params}, inputs)
    rngs = {"dropout": jax.random.key(0)}
    noisy = jax.jit(lambda p: model.apply({"params": p}, inputs, train=True, rngs=rngs))(params)
    assert np.abs(np.asarray(calm) - noisy).max() > 1e-3


def test_bit_gives_a_map_for_every_stage():
    model, params, inputs = build("bit", num_classes=None)
    features = jax.jit(model.apply)({"params": params}, inputs)
    assert [stage.shape for stage in features.stages] == [(2, 16, 16, 128), (2, 8, 8, 256)]
    np.testing.assert_array_equal(features.stages[-1], features.grid)
    np.testing.assert_allclose(
        features.pooled, np.mean(features.grid, (1, 2)), rtol=1e-5, atol=1e-6
    )
    assert np.min(features.grid) == 0.0


def test_bit_pads_both_sides_alike():
    images = IMAGES[:, :8, :8]  # XLA's SAME would pad bottom and right alone
    conv = StdConv(4, 3, jnp.float32, stride=2, style=BIT)
    params = random_params(conv, images)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    unstrided = StdConv(4, 3, jnp.float32).apply({"params": params}, padded)
    np.testing.assert_allclose(
        conv.apply({"params": params}, images), unstrided[:, 1:-1:2, 1:-1:2], rtol=1e-4, atol=1e-5
    )


def test_standardised_kernels_ignore_scale_and_shift():
    conv = StdConv(4, 3, jnp.float32)
    params = random_params(conv, IMAGES)
    moved = {"kernel": 7.0 * params["kernel"] + 3.0}
    np.testing.assert_allclose(
        conv.apply({"params": moved}, IMAGES),
        conv.apply({"params": params}, IMAGES),
        rtol=1e-2,
        atol=1e-2,
    )


def test_mixer_pads_where_a_vit_crops():
    model, _, _ = build("mixer", num_classes=None)
    features, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), IMAGES[:, :13, :16])
    assert features.grid.shape == (2, 4, 4, 32)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("R50+ViT-B/16", "r50_b16"),
        ("R26+ViT-S_32", "r26_s32"),
        ("R+ViT-Ti_16", "r_ti16"),
        ("Mixer-B/16", "mixer_b16"),
        ("BiT-R101x3", "bit_r101x3"),
        ("FlexiViT-B", "flexivit_b"),
    ],
)
def test_names_as_people_write_them(spelling, name):
    assert models.find(spelling) == name


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"width_factor=0\.3"):
        models.build("bit_r50x1", width_factor=0.3)
    with pytest.raises(UserError, match="pooling='token'"):
        models.build("text_b", pooling="token")
    model, params, _ = build("bert")
    with pytest.raises(UserError, match="9 tokens and max_length is 8"):
        jax.eval_shape(model.apply, {"params": params}, np.zeros((1, 9), np.int32))
    model, params, _ = build("text")
    with pytest.raises(UserError, match="holds 6 tokens but these texts have 4"):
        jax.eval_shape(model.apply, {"params": params}, TOKENS[:, :4])


def test_bert_drops_and_starts_as_flaxformers():
    """Attention weights and outputs are dropped, not the hidden layer of the MLP."""
    one = {"depth": 1, "scan": False, "dropout": 0.5}
    model, params, _ = build("bert", num_classes=0, **one)

    @jax.jit
    def dropped(key):
        found = {}

        def record(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if isinstance(context.module, nn.Dropout) and context.module.rate:
                found["/".join(context.module.path)] = out == 0
            return out

        with nn.intercept_methods(record):
            model.apply({"params": params}, TOKENS, train=True, rngs={"dropout": key})
        return found

    zeros = jax.device_get(dropped(jax.random.key(1)))
    outputs = ["Dropout_0", "blocks_0/Dropout_0", "blocks_0/Dropout_1"]
    assert sorted(zeros) == [*outputs, "blocks_0/attn/Dropout_0"]
    assert all(0.2 < where.mean() < 0.8 for where in zeros.values())
    # All tokens of a text lose the same features of the MLP's output, and only of this.
    alike = [(zeros[name] == zeros[name][:, :1]).all() for name in outputs]
    assert alike == [False, False, True]
    assert model.block_spec().initialization == "bert"
    kernel = SCHEMES["bert"].kernel(jax.random.key(0), (64, 64))
    assert 0.038 < abs(kernel).max() <= 0.04
    assert abs(kernel.std() - 0.0176) < 0.001
