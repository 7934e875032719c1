"""The options of the ViT: each does what it says, and none changes what it should not."""

import functools
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vit import IMAGES, TINY, apply, init, tiny

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models.layers.positions import grid_coordinates, rotary_angles, rotate, sincos_2d

OPTIONS = {
    "token": {"representation_size": 8, "class_token_position": False},
    "map": {"pooling": "map"},
    "sincos2d": {"pooling": "mean", "class_token": True, "position": "sincos2d"},
    "rope": {"position": "rope", "num_registers": 2, "mlp": "swiglu", "layer_scale": 0.1},
    "rope_dinov3": {"position": "rope_dinov3", "qk_norm": True, "norm": "rmsnorm"},
    "rope_mixed": {"position": "rope_mixed"},
    "parallel": {"parallel": True, "qk_norm": True, "layer_scale": 0.1},
    # A ViT of CLIP's, EVA's, and AIMv2's fields together.
    "clip_eva_aimv2": {
        **{"patch_bias": False, "embed_norm": True, "pre_norm": True, "fc_norm": True},
        **{"last_norm": False, "activation": "quick_gelu", "norm_epsilon": 1e-5, "mlp_norm": True},
        **{"key_bias": False, "proj_bias": False, "mlp_bias": False, "attention_norm": True},
        **{"layer_scale": 0.1, "mlp_layer_scale": False, "num_kv_heads": 1, "pooling": "map"},
        **{"position": "rope", "position_table": True, "rope_base": 1e4, "rope_grid": (2, 5)},
        **{"rope_offset": 1.0, "rope_columns_first": True, "rope_interleaved": True},
        **{"pool_prefix": True, "num_registers": 1, "map_heads": 4, "map_mlp_dim": 8},
    },
}


# Goldens and the last option have what these have.
CONTAINED = ("map", "sincos2d")


@pytest.mark.parametrize(
    "option",
    [pytest.param(name, marks=pytest.mark.soak) if name in CONTAINED else name for name in OPTIONS],
)
def test_gradient_reaches_every_parameter(option):
    model = tiny(**OPTIONS[option])
    grads = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, IMAGES) ** 2)))(
        init(model)
    )
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" in name:
            continue  # softmax does not see a constant added to all keys
        layers = np.asarray(grad) if "blocks" in name else np.asarray(grad)[None]
        assert np.all(np.abs(layers).reshape(len(layers), -1).max(axis=1) > 1e-6), name


@pytest.mark.parametrize("option", ["rope_mixed", "clip_eva_aimv2", "parallel"])
def test_unscanned_blocks_compute_the_same(option):
    model, unscanned = tiny(**OPTIONS[option]), tiny(scan=False, **OPTIONS[option])
    params = init(model)
    unstacked = models.unstack_blocks(params)
    np.testing.assert_allclose(
        apply(unscanned, unstacked), apply(model, params), rtol=1e-4, atol=1e-5
    )
    jax.tree.map(np.testing.assert_array_equal, models.stack_blocks(unstacked), params)
    assert jax.tree.map(jnp.shape, init(unscanned)) == jax.tree.map(jnp.shape, unstacked)


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({"scan": False, "remat": "full"}, {"scan": False}),
        ({"remat": "dots_with_no_batch_dims_saveable"}, {}),
        ({"remat": "full", "unroll": 2}, {}),
        pytest.param({"unroll": 3}, {}, marks=pytest.mark.soak),
        ({"unroll": 0}, {}),
    ],
)
def test_remat_and_unrolling_change_nothing(fields, plain):
    """Nor the noise: what is computed again, or in another order, draws the same masks."""
    found = noisy_gradients(tiny(dropout=0.1, **fields))
    expected = noisy_gradients(tiny(dropout=0.1, **plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@functools.cache
def noisy_gradients(model):
    def loss(params):
        rngs = {"dropout": jax.random.key(3)}
        return jnp.sum(model.apply({"params": params}, IMAGES, train=True, rngs=rngs) ** 2)

    return jax.jit(jax.grad(loss))(init(model))


@pytest.mark.parametrize("unroll", [-1, True, 1.5, "all"])
def test_unroll_is_a_number_of_blocks(unroll):
    with pytest.raises(UserError, match=f"unroll={unroll!r}: write (0 or more|a whole number)"):
        apply(tiny(unroll=unroll), {})


def test_half_precision_keeps_parameters_and_logits_in_float32():
    model = tiny(dtype="bfloat16", pooling="map", position="rope_mixed", num_registers=1)
    params = init(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = apply(model, params)
    assert logits.dtype == jnp.float32
    expected = apply(tiny(pooling="map", position="rope_mixed", num_registers=1), params)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=0.02 * scale)
    assert not np.array_equal(logits, expected)
    wide = tiny(dtype="bfloat16", residual_dtype="float32", pooling="map", position="none")
    narrow = tiny(dtype="bfloat16", pooling="map", position="none")
    params = init(wide)
    assert not np.array_equal(apply(wide, params), apply(narrow, params))


def test_features_of_every_pooling():
    for pooling in ("token", "mean", "map", "none"):
        model = tiny(num_classes=0, pooling=pooling, num_registers=2)
        features = apply(model, init(model))
        assert features.grid.shape == (2, 3, 4, 32)
        assert features.stages[0].shape == features.grid.shape
        assert (features.pooled is None) == (pooling == "none")
        if pooling == "mean":
            np.testing.assert_allclose(
                features.pooled, np.mean(features.grid, axis=(1, 2)), rtol=1e-5, atol=1e-6
            )


def test_head_starts_at_zero_and_its_bias_where_told():
    model = tiny(head_bias_init=-10.0, representation_size=5)

    @functools.partial(jax.jit, static_argnums=0)
    def head_of(model):
        return nn.meta.unbox(model.init(jax.random.key(0), IMAGES)["params"]["head"])

    params = {**init(model), "head": head_of(model)}
    np.testing.assert_array_equal(apply(model, params), np.full((2, 3), -10.0))
    assert params["head"]["kernel"].shape == (5, 3)
    # Without classes, the features have the output of the representation layer.
    bare = {**params, "head": {"pre_logits": params["head"]["pre_logits"]}}
    features = apply(model.clone(num_classes=0), bare)
    assert features.pooled.shape == (2, 5)
    kernel = np.float32(np.random.default_rng(0).normal(size=(5, 3)))
    logits = apply(model, {**params, "head": {**params["head"], "kernel": kernel}})
    np.testing.assert_allclose(features.pooled @ kernel - 10, logits, atol=1e-4)
    random = tiny(head_zero_init=False)
    assert np.abs(head_of(random)["kernel"]).min() > 0


def test_pixels_that_fill_no_patch_are_dropped():
    model = tiny()
    params = init(model)
    padded = np.pad(IMAGES, ((0, 0), (0, 3), (0, 1), (0, 0)), constant_values=7.0)
    np.testing.assert_array_equal(apply(model, params, padded), apply(model, params))


def test_every_parameter_names_its_logical_axes():
    model = tiny(pooling="map", mlp="swiglu", layer_scale=0.1, qk_norm=True, num_registers=2)
    boxed = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
    stacked = boxed["backbone"]["blocks"]["attn"]["query"]["kernel"]
    assert stacked.names == ("layers", "embed", "heads", "head_dim")


def test_training_noise_follows_its_key():
    model = tiny(dropout=0.1, attention_dropout=0.1, drop_path=0.2, patch_drop=0.25)
    params = init(model)

    @jax.jit
    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, IMAGES, train=True, rngs=rngs)

    first = np.asarray(run(0))
    np.testing.assert_array_equal(run(0), first)
    assert np.abs(first - run(1)).max() > 1e-3
    assert apply(model, params).shape == (2, 3)  # needs no key


def test_drop_path_zeroes_whole_examples_and_spares_the_first_block():
    images = np.repeat(IMAGES[:1], 64, axis=0)
    model = tiny(num_classes=0, depth=1, drop_path=0.5)
    params = init(model)
    out = apply(model, params, images, train=True, rngs={"dropout": jax.random.key(0)}).pooled
    np.testing.assert_allclose(out, apply(model, params, images).pooled, rtol=1e-5, atol=1e-6)
    model = tiny(num_classes=0, depth=1, drop_path=0.5, constant_drop_path=True)
    dropped = apply(model, params, images, train=True, rngs={"dropout": jax.random.key(0)}).pooled
    assert len(np.unique(np.round(np.asarray(dropped[:, 0]), 4))) == 4
    model = tiny(num_classes=0, depth=2, drop_path=0.5)
    params = init(model)
    out = apply(model, params, images, train=True, rngs={"dropout": jax.random.key(0)}).pooled
    distinct = np.unique(np.round(np.asarray(out[:, 0]), 4))
    assert len(distinct) == 4  # attention kept or not, MLP kept or not


def test_patch_drop_shortens_the_training_sequence():
    model = tiny(num_classes=0, patch_drop=0.5, pooling="mean")
    params = init(model)
    features, seen = apply(
        model,
        params,
        train=True,
        rngs={"dropout": jax.random.key(0)},
        mutable=["intermediates"],
    )
    assert features.grid is None
    assert seen["intermediates"]["blocks"]["attn"]["attention"][0].shape[-1] == 6


def test_class_token_has_a_position_or_not():
    with_row = init(tiny())["backbone"]["pos_embed"]
    without = init(tiny(class_token_position=False))["backbone"]["pos_embed"]
    assert (with_row.shape[1], without.shape[1]) == (13, 12)


def test_sincos_by_definition():
    rows, columns, width = 3, 5, 16
    table = sincos_2d(grid_coordinates(rows, columns), width)
    frequencies = 1e-4 ** (np.arange(4) / 3)
    for row in range(rows):
        for column in range(columns):
            x, y = column * frequencies, row * frequencies
            expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)])
            np.testing.assert_allclose(table[row * columns + column], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["axial", "dinov3"])
def test_rotary_products_depend_on_the_offset_alone(kind):
    grid = np.array([6.0, 5.0], np.float32)
    coordinates = grid_coordinates(6, 5)
    query, key = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    angles = rotary_angles(kind, coordinates, grid, 16)
    turned = [rotate(jnp.broadcast_to(x, (1, 30, 1, 16)), angles)[0, :, 0] for x in (query, key)]
    products = np.asarray(turned[0] @ turned[1].T)
    by_place = products.reshape(6, 5, 6, 5)
    np.testing.assert_allclose(by_place[1, 1, 3, 2], by_place[2, 3, 4, 4], rtol=1e-4, atol=1e-5)
    assert abs(by_place[1, 1, 3, 2] - by_place[1, 1, 2, 3]) > 1e-3
    lengths = [np.linalg.norm(x, axis=-1) for x in turned]
    np.testing.assert_allclose(lengths[0], np.linalg.norm(query), rtol=1e-5)


def test_dinov3_angles_span_one_turn_each_way():
    angles = rotary_angles("dinov3", grid_coordinates(4, 2), np.array([4.0, 2.0]), 8)
    np.testing.assert_allclose(
        angles[:, 0, 0] / (2 * np.pi), np.repeat([-0.75, -0.25, 0.25, 0.75], 2), rtol=1e-5
    )
    np.testing.assert_allclose(angles[:, 0, 2] / (2 * np.pi), np.tile([-0.5, 0.5], 4), rtol=1e-5)


def test_another_image_size_is_refused_where_positions_are_learned_only():
    params = init(tiny())
    with pytest.raises(UserError, match="position table holds 13 tokens but these images make 10"):
        apply(tiny(), params, IMAGES[:, :, :12])
    rotary = tiny(position="rope")
    assert apply(rotary, init(rotary), IMAGES[:, :, :12]).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vit_b17", {}, "did you mean 'vit_b1"),
        ("resnet", {}, "model 'resnet' is unknown"),
        ("vit_b16", {"pathc_size": 8}, "did you mean 'patch_size'"),
        ("vit_b16", {"pooling": "cls"}, "pooling='cls'"),
        ("vit_b16", {"pooling": "token", "class_token": False}, "needs the class token"),
        ("vit_b16", {"num_heads": 5}, "divisor of 768"),
        ("vit_b16", {"attention": "flash"}, "attention='flash'"),
        ("vit_b16", {"attention": "splash", "attention_dropout": 0.1}, "cannot drop"),
        ("vit_b16", {"remat": "dots"}, "remat='dots'"),
        ("vit_b16", {"dtype": "bf16"}, "dtype='bf16' is not a floating-point type"),
        ("vit_b16", {"dtype": None}, "dtype=None is not a floating-point type"),
        ("vit_b16", {"dtype": "float64"}, "dtype='float64' is not a floating-point type"),
        ("vit_b16", {"drop_path": float("nan")}, "drop_path=nan: write a number"),
        ("vit_b16", {"residual_dtype": "int32"}, "residual_dtype='int32'"),
        ("vit_b16", {"drop_path": 1.0}, "drop_path=1.0"),
        ("vit_b16", {"head_bias_init": -7.0}, "num_classes"),
        ("vit", {"width": 32}, "needs depth, num_heads, patch_size"),
        ("vit_b16", {"window": 14}, "window needs blocks of their own"),
        ("vit_b16", {"window": 2.5}, "model 'vit_b16', window=2.5: write a whole number"),
        ("vit_b16", {"width": "abc"}, "width='abc': write a whole number"),
        ("vit_b16", {"depth": True}, "depth=True: write a whole number"),
        ("vit_b16", {"scan": "maybe"}, "scan='maybe': write true or false"),
        ("vit_b16", {"drop_path": "a"}, "drop_path='a': write a number"),
        ("vit_b16", {"mlp_dim": "x"}, "mlp_dim='x': write a whole number or None"),
        ("vit_b16", {"patch_size": "16x16"}, "write a whole number or a list of whole numbers"),
        ("vit_b16", {"patch_size": (16, 16, 3)}, r"patch_size=.*write pixels, 1 or more, or \(he"),
        ("mixer_b16", {"patch_size": 0}, "patch_size=0: write pixels"),
        ("vit_b16", {"num_heads": 0}, "num_heads=0: write 1 or more"),
        ("vit_b16", {"depth": -1}, "depth=-1: write 0 or more"),
        ("vit_b16", {"num_classes": 2.0}, "num_classes=2.0: write a whole number"),
        ("vit_b16", {"global_blocks": (2,)}, "exceptions from window"),
        ("vit_b16", {"window": 14, "global_blocks": (2, 12)}, "has 12; the 12 blocks count from 0"),
        ("no.such:Model", {}, "cannot be imported"),
        ("vit_jax.models:build", {}, "'vit_jax.models:build' is no model"),
    ],
)
def test_mistakes_are_named(name, fields, message):
    with pytest.raises(UserError, match=message):
        models.build(name, **fields)


def test_images_smaller_than_a_patch_are_refused():
    model = tiny(patch_size=32)
    with pytest.raises(UserError, match="smaller than one patch"):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("ViT-B/16", "vit_b16"),
        ("B/16", "vit_b16"),
        ("vit-ti16", "vit_ti16"),
        ("So400m/14", "vit_so400m14"),
        ("ViT-G/14", "vit_G14"),
        ("ViT-g/14", "vit_g14"),
        ("G-opt/16", "vit_Gopt16"),
    ],
)
def test_names_as_people_write_them(spelling, name):
    assert models.find(spelling) == name


def test_a_module_of_ones_own_is_named_by_its_path():
    model = models.build("vit_jax.models.vit:VisionTransformer", num_classes=3, **TINY)
    assert apply(model, init(model)).shape == (2, 3)


def test_a_module_of_ones_own_may_have_a_name_of_timm(monkeypatch):
    name = "vit_base_patch16_224"
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(Net=type(tiny())))
    assert models.find(f"{name}:Net") == f"{name}:Net"
    with pytest.raises(UserError, match="is no model"):
        models.find("vit_jax.models:build")


# A fixed table is used as a learned one is, and every rotation in one place.
FIXED = [pytest.param(name, marks=pytest.mark.soak) for name in ("sincos2d", "rope")]


@pytest.mark.parametrize("position", ["learned", "rope_dinov3", "rope_mixed", *FIXED])
def test_the_patches_that_are_kept_are_all_that_the_encoder_sees(position):
    """All of them in another order give the same tokens in that order; others change nothing."""
    model = tiny(num_classes=0, position=position, num_registers=1)
    params = init(model)
    whole = apply(model, params)
    order = np.random.default_rng(1).permuted(
        np.tile(np.arange(12, dtype=np.int32), (2, 1)), axis=1
    )
    part = jax.jit(lambda images, kept: model.apply({"params": params}, images, kept=kept))
    shuffled = part(IMAGES, order)
    assert shuffled.grid is None
    assert np.array_equal(shuffled.kept, order)
    expected = np.take_along_axis(np.asarray(whole.tokens), order[:, :, None], axis=1)
    np.testing.assert_allclose(shuffled.tokens, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shuffled.pooled, whole.pooled, rtol=1e-4, atol=1e-5)
    few = order[:, :5]
    hidden = np.ones(12, bool)
    hidden[few[0]] = False
    noise = np.repeat(np.repeat(hidden.reshape(3, 4), 4, axis=0), 4, axis=1)[None, :, :, None]
    np.testing.assert_array_equal(
        part(IMAGES[:1], few[:1]).tokens,
        part(IMAGES[:1] + noise, few[:1]).tokens,
    )


def test_windows_need_all_patches():
    model = tiny(num_classes=0, pooling="mean", window=2, scan=False)
    params = init(model)
    with pytest.raises(UserError, match="need all patches; write window=0, position_bias="):
        apply(model, params, kept=np.zeros((2, 1), np.int32))


def test_the_number_of_images_may_be_left_open():
    """Exported programs take any number of rows."""
    model = tiny(num_registers=2, distill_token=True)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), image))
    (rows,) = jax.export.symbolic_shape("rows")
    images = jax.ShapeDtypeStruct((rows, 8, 8, 3), np.float32)
    assert jax.eval_shape(model.apply, params, images).shape == (rows, 3)
