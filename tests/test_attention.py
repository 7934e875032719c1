"""Attention maps against recorded weights, and rollout against its definition."""

import functools
import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import attention, models
from vit_jax.errors import UserError
from vit_jax.report import figures

_spec = importlib.util.spec_from_file_location(
    "golden_trees", Path(__file__).parent / "models" / "golden_trees.py"
)
golden_trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden_trees)

TINY = {"patch_size": 4, "width": 16, "depth": 3, "num_heads": 2}
SHAPE = (2, 8, 12, 3)  # a grid of 2 by 3 patches


def build(**fields):
    """A tiny model with random weights, large enough that attention is far from uniform."""
    model = models.build("vit", **(TINY | fields))
    images = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    params = golden_trees.random_params(model, images)
    return model, params, images


@functools.cache
def maps_of(**fields):
    return attention.attention_maps(*build(**fields))


def rollout_by_definition(maps):
    """Abnar and Zuidema 2020, equation 1: a plain product of whole matrices."""
    layers, batch, _, tokens, _ = maps.layers.shape
    result = []
    for example in range(batch):
        joint = np.eye(tokens)
        for layer in range(layers):
            mean = maps.layers[layer, example].astype(np.float64).mean(axis=0)
            residual = 0.5 * mean + 0.5 * np.eye(tokens)
            joint = residual / residual.sum(axis=1, keepdims=True) @ joint
        if maps.pooled is not None:
            row = maps.pooled[example].mean(axis=0) @ joint[maps.num_prefix :]
        elif maps.reads_class_token:
            row = joint[0]
        else:
            row = joint[maps.num_prefix :].mean(axis=0)
        row = row[maps.num_prefix :]
        result.append((row / row.sum()).reshape(maps.grid))
    return np.stack(result)


POOLINGS = [
    {"pooling": "token"},
    {"pooling": "token", "num_registers": 3},
    {"pooling": "mean"},
    {"pooling": "mean", "num_registers": 2},
    {"pooling": "mean", "class_token": True},
    {"pooling": "map"},
    {"pooling": "map", "num_registers": 1},
    {"pooling": "none"},
]


@pytest.mark.parametrize("case", ["vit_token_rect_p8", "vit_token_rep_p8"])
@pytest.mark.parametrize("scan", [False, True])
def test_weights_are_those_of_the_reference(case, scan):
    config, flat, io = golden_trees.load("vision_transformer", case, ".")
    encoder = config["config"]["transformer"]
    model = models.build(
        "vit",
        patch_size=config["config"]["patches"]["size"],
        width=config["config"]["hidden_size"],
        depth=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        mlp_dim=encoder["mlp_dim"],
        pooling="token",
        scan=scan,
    )
    params = golden_trees.vit(flat)
    params = models.stack_blocks(params) if scan else params
    maps = attention.attention_maps(model, params, io["images"])
    for layer in range(encoder["num_layers"]):
        recorded = io[f"attn/encoderblock_{layer}"]
        np.testing.assert_allclose(maps.layers[layer], recorded, rtol=0, atol=1e-5)
    height, width = io["images"].shape[1:3]
    assert maps.grid == (height // 8, width // 8)
    assert maps.num_prefix == 1
    last = io[f"attn/encoderblock_{encoder['num_layers'] - 1}"][:, :, 0, 1:].mean(axis=1)
    last = (last / last.sum(axis=1, keepdims=True)).reshape(-1, *maps.grid)
    np.testing.assert_allclose(attention.last_layer_map(maps), last, atol=1e-5)


@pytest.mark.parametrize("fields", POOLINGS)
def test_shapes_and_sums_for_every_pooling(fields):
    maps = maps_of(**fields)
    prefix = fields.get("num_registers", 0)
    prefix += fields["pooling"] == "token" or fields.get("class_token", False)
    assert maps.num_prefix == prefix
    assert maps.grid == (2, 3)
    assert maps.layers.shape == (3, 2, 2, 6 + prefix, 6 + prefix)
    np.testing.assert_allclose(maps.layers.sum(axis=-1), 1.0, atol=1e-6)
    assert (maps.pooled is not None) == (fields["pooling"] == "map")
    if maps.pooled is not None:
        assert maps.pooled.shape == (2, 2, 6)
        np.testing.assert_allclose(maps.pooled.sum(axis=-1), 1.0, atol=1e-6)
    assert attention.head_maps(maps).shape == (3, 2, 2, 2, 3)
    for result in (attention.last_layer_map(maps), attention.rollout(maps)):
        assert result.shape == (2, 2, 3)
        np.testing.assert_allclose(result.sum(axis=(1, 2)), 1.0, atol=1e-6)


def test_distances_by_hand():
    layers = np.zeros((1, 1, 2, 7, 7), np.float32)  # a class token and a grid of 2 by 3
    layers[0, 0, 0] = np.eye(7)  # every patch looks at itself
    layers[0, 0, 1, :, 0] = 0.5  # half of the attention goes to the class token,
    layers[0, 0, 1, :, 6] = 0.5  # half to the patch in the corner
    maps = attention.AttentionMaps(layers, None, (2, 3), 1, True)
    from_corner = [5**0.5, 2**0.5, 1, 2, 1, 0]
    np.testing.assert_allclose(attention.distances(maps), [[0, np.mean(from_corner)]], rtol=1e-6)


@pytest.mark.parametrize("fields", POOLINGS)
def test_rollout_is_the_product_of_all_layers(fields):
    maps = maps_of(**fields)
    expected = rollout_by_definition(maps)
    assert expected.max() > 1.2 * expected.min()  # there is something to see
    np.testing.assert_allclose(attention.rollout(maps), expected, atol=1e-6)


def test_scanned_and_unscanned_models_give_the_same_maps():
    model, params, images = build(scan=True)
    scanned = attention.attention_maps(model, params, images)
    model = models.build("vit", **TINY, scan=False)
    plain = attention.attention_maps(model, models.unstack_blocks(params), images)
    np.testing.assert_allclose(scanned.layers, plain.layers, atol=1e-6)


def test_more_than_ten_unscanned_layers_keep_their_order():
    model, params, images = build(depth=12, scan=True)
    scanned = attention.attention_maps(model, params, images)
    model = models.build("vit", **(TINY | {"depth": 12}), scan=False)
    plain = attention.attention_maps(model, models.unstack_blocks(params), images)
    np.testing.assert_allclose(scanned.layers, plain.layers, atol=1e-5)


def test_a_classifier_s_backbone_is_looked_into():
    model, params, images = build(num_classes=4)
    maps = attention.attention_maps(model, params, images)
    bare = attention.attention_maps(model.backbone, params["backbone"], images)
    np.testing.assert_array_equal(maps.layers, bare.layers)


def test_head_maps_are_the_class_token_s_row():
    maps = maps_of(pooling="token", num_registers=2)
    expected = maps.layers[1, 0, 1, 0, 3:].reshape(2, 3)
    np.testing.assert_array_equal(attention.head_maps(maps)[1, 0, 1], expected)


def test_under_attention_pooling_the_output_s_map_is_the_probe_s():
    maps = maps_of(pooling="map")
    expected = maps.pooled.mean(axis=1).reshape(2, 2, 3)
    np.testing.assert_allclose(attention.last_layer_map(maps), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x[0], r"images are float32 \[8, 12, 3\]: give normalized floats \[batch, "),
        (lambda x: np.asarray(x).astype(np.uint8), r"images are uint8 \[2, 8, 12, 3\]"),
        (lambda x: x[:0], r"images are float32 \[0, 8, 12, 3\]"),
        (lambda x: ["a.jpg"], r"images are \['a.jpg'\]: give"),
        (lambda x: x[..., :1], "model, parameters and images do not fit: .*kernel"),
    ],
)
def test_images_that_the_model_cannot_take_are_one_line(wrong, message):
    model, params, images = build()
    with pytest.raises(UserError, match=message):
        attention.attention_maps(model, params, wrong(images))


def test_a_model_without_attention_says_so():
    model, params, images = build(depth=0, position="none", pooling="mean")
    with pytest.raises(UserError, match="no self-attention"):
        attention.attention_maps(model, params, images)


def test_an_overlay_is_bright_where_attention_is():
    heat = np.zeros((2, 3))
    heat[0, 2] = 0.01
    image = attention.overlay(np.zeros((8, 12, 3), np.uint8), heat)
    assert isinstance(image, Image.Image)
    assert image.size == (228, 152)  # 19 times 12 by 8: enlarged by whole pixels
    brightness = np.asarray(image, np.float32).sum(axis=-1)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert row < 152 / 2
    assert column > 228 * 2 / 3
    assert brightness[-1, 0] < 0.1 * brightness.max()


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((300, 200), np.uint8),
        np.zeros((300, 200, 1), np.float32),
        Image.new("RGB", (200, 300)),
    ],
)
def test_overlays_of_any_picture_keep_its_size(picture):
    assert attention.overlay(picture, np.ones((4, 4))).size == (200, 300)


@pytest.mark.parametrize("heat", [np.zeros((2, 2)), np.full((2, 2), 0.3)])
def test_attention_that_is_alike_everywhere_leaves_the_picture_bare(heat):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    image = attention.overlay(picture, heat)
    enlarged = Image.fromarray(picture).resize(image.size, Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(enlarged))


@pytest.mark.parametrize("pooling", ["token", "map", "mean"])
def test_the_figure_and_the_panel_draw(pooling):
    model, params, images = build(pooling=pooling)
    maps = attention.attention_maps(model, params, images)
    figure = attention.figure(images[1], maps, index=1)
    names = [axes.get_title() for axes in figure.axes]
    assert names[:3] == ["image", "pooling" if pooling == "map" else "last layer", "rollout"]
    panel = attention.panel(list(images), maps, ["first", "second"])
    assert len(panel.axes) == 6 + 1  # The scale of the colors.
    assert figures.png(figure)
    assert figures.png(panel)


def test_sections_show_what_the_model_has():
    def titles(**fields):
        model, params, images = build(**fields)
        found = attention.sections(model, params, images, list(images), ["a", "b"])
        return [section.title for section in found]

    every = [
        "Where the model looks",
        "Attention of every head",
        "How far every head looks",
        "What a patch is made of",
        "What positions are like",
    ]
    assert titles(num_classes=3) == every
    assert titles(pooling="mean", position="sincos2d") == every[:4]
    assert titles(depth=0, position="none", pooling="mean") == every[3:4]


def random_boxed(model, images):
    """Parameters as a model returns them, with the names of their axes."""
    draw = np.random.default_rng(0).normal
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda x: draw(0, 0.1, x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
    ("name", "fields", "shape"),
    [
        ("vit", {"patch_size": 2}, (2, 2, 1, 8)),
        ("conv_stem", {"patch_size": 2, "stem_strides": (1,), "stem_kernel": 3}, (3, 3, 1, 192)),
        ("r_ti16", {"patch_size": 1}, (7, 7, 1, 64)),
    ],
)
def test_filters_are_those_that_see_pixels(name, fields, shape):
    sizes = {"width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8, "num_classes": None}
    model = models.build(name, **sizes, **fields)
    made = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 1), np.float32))
    assert attention._pixel_kernel(nn.meta.unbox(made["params"])).shape == shape
    assert attention._pixel_kernel({"root": {}}) is None


def test_positions_of_a_flexivit_are_shown_on_the_image_s_grid():
    model = models.build("flexivit_s", **{**TINY, "patch_size": 2}, table_grid=3, kernel_size=4)
    images = np.zeros((1, 10, 14, 3), np.float32)
    params = random_boxed(model, images)
    found = attention.sections(model, params, images, list(images), ["a"])
    assert found[-1].title == "What positions are like"


def test_boxed_parameters_are_accepted():
    model = models.build("vit", **TINY)
    images = np.zeros(SHAPE, np.float32)
    params = random_boxed(model, images)
    maps = attention.attention_maps(model, params, images)
    assert maps.layers.shape == (3, 2, 2, 7, 7)
