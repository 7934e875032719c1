"""Fitting a checkpoint to another model: what is kept, changed, started anew, or refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from models_to_save import build, random_params

from vit_jax import checkpoints, models
from vit_jax.checkpoints import loading
from vit_jax.checkpoints.fit.surgery import sincos_table
from vit_jax.checkpoints.weights import Weights, from_params
from vit_jax.errors import UserError
from vit_jax.models.heads.masked_autoencoder import MaskedAutoencoder, PatchDecoder
from vit_jax.models.heads.prototypes import PrototypeHead
from vit_jax.models.heads.self_distillation import SelfDistillation
from vit_jax.models.layers import positions


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    """(model, parameters, images, their checkpoint)."""
    model, params, images = build("token")
    path = tmp_path_factory.mktemp("merging") / "token.npz"
    checkpoints.save(params, model, path, "npz")
    return model, params, images, path


def variant(**fields):
    base = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
    return models.build("vit", **{**base, "num_classes": 3, **fields})


def names(lines):
    return sorted(line.split(":")[0] for line in lines)


HEAD = ["head/bias", "head/kernel"]


def test_same_model_loads_every_array(token):
    model, params, _, path = token
    loaded, report = checkpoints.load_with_report(path, model)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert len(report.loaded) == 2 * 16 + 8
    assert str(report) == f"{path}: npz in published naming, 40 arrays loaded as they are"


def test_head_is_kept_where_it_fits_and_started_at_zero_where_not(token):
    model, params, _, path = token
    for head in ("auto", "keep"):
        loaded = checkpoints.load(path, model, head=head)
        np.testing.assert_array_equal(loaded["head"]["kernel"], params["head"]["kernel"])
    five = variant(num_classes=5, head_bias_init=-10.0)
    for target, head in ((five, "auto"), (five, "zero"), (variant(head_bias_init=-10.0), "zero")):
        loaded, report = checkpoints.load_with_report(path, target, head=head)
        assert not loaded["head"]["kernel"].any()
        assert (loaded["head"]["bias"] == -10).all()
        assert names(report.initialised) == names(report.ignored) == HEAD
    with pytest.raises(UserError, match="it has 3 classes, the model 5"):
        checkpoints.load(path, five, head="keep")
    with pytest.raises(UserError, match="did you mean 'keep'"):
        checkpoints.load(path, model, head="kept")


def test_a_head_of_another_task_is_not_made_up_where_it_is_to_be_kept(token):
    backbone = variant(num_classes=None, pooling="none", position="learned")
    segmenter = models.Segmenter(backbone, 3)
    path = token[3]
    started = checkpoints.load_with_report(path, segmenter)[1].initialised
    assert all(line.startswith("decoder/") for line in started)
    with pytest.raises(UserError, match="cannot be kept: there is no decoder/score/bias in"):
        checkpoints.load(path, segmenter, head="keep")


def test_a_head_of_another_task_starts_anew_if_asked(tmp_path):
    segmenter = models.Segmenter(variant(num_classes=None, pooling="none"), 3)
    params = random_params(segmenter, np.zeros((1, 8, 8, 3), np.float32))
    checkpoints.save(params, segmenter, tmp_path / "own", "orbax")
    for head, anew in (("auto", []), ("zero", ["decoder/score/bias", "decoder/score/kernel"])):
        loaded, report = checkpoints.load_with_report(tmp_path / "own", segmenter, head=head)
        assert names(report.initialised) == anew
        kept = loaded["decoder"]["score"]["kernel"] == params["decoder"]["score"]["kernel"]
        assert np.all(kept) == (not anew)


def test_a_head_of_another_shape_starts_anew_unless_it_is_to_be_kept():
    backbone = variant(num_classes=None)

    def network(prototypes):
        heads = (PrototypeHead(n, depth=1, bottleneck=8) for n in (prototypes, 5))
        return SelfDistillation(backbone, *heads)

    params = random_params(network(6), np.zeros((1, 8, 8, 3), np.float32))
    weights = Weights(arrays=from_params(params, network(6)), format="a file")
    loaded, report = loading.fit(weights, network(4), "a run", image_size=8)
    anew = ["dense1/bias", "dense1/kernel", "prototypes/kernel", "prototypes/scale"]
    assert names(report.initialised) == [f"dino_head/{name}" for name in anew]
    assert "a new head; dino_head/prototypes/scale of the checkpoint is [6]" in str(report)
    assert (loaded["dino_head"]["prototypes"]["scale"] == np.ones(4)).all()
    for name in ("ibot_head", "backbone", "mask_token"):
        jax.tree.map(np.testing.assert_array_equal, loaded[name], params[name])
    with pytest.raises(UserError, match=r"prototypes/scale is \[6\] and should be \[4\]"):
        loading.fit(weights, network(4), "a run", image_size=8, head="keep")


@pytest.mark.parametrize("head", ["auto", "keep", "zero"])
def test_the_fixed_table_of_a_decoder_is_that_of_the_new_grid(head):
    fields = {"width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8}
    decoder = PatchDecoder(num_outputs=48, **fields)
    model = MaskedAutoencoder(variant(num_classes=None, pooling="mean"), decoder)
    params = random_params(model, np.zeros((1, 8, 8, 3), np.float32))
    weights = Weights(arrays=from_params(params, model), format="a file", grid=(2, 2))
    loaded, report = loading.fit(weights, model, "a run", image_size=16, head=head)
    table = loaded["decoder"]["pos_embed"]
    np.testing.assert_array_equal(table, positions.sincos_table(4, 4, 8))
    assert "decoder/pos_embed: the fixed sines and cosines of another grid" in report.initialised
    kept = loaded["decoder"]["mask_token"] == params["decoder"]["mask_token"]
    assert kept.all() == (head != "zero")
    same = loading.fit(weights, model, "a run", head="keep")[0]  # Of as many tokens as the run.
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("grid", [(4,), (4, 0), (2.0, 8.0)])
def test_a_grid_is_two_numbers(token, grid):
    with pytest.raises(UserError, match="write two whole numbers, rows and columns"):
        checkpoints.load(token[3], token[0], source_grid=grid)


def test_a_head_behind_another_layer_is_not_kept(tmp_path, token):
    """As many classes, but trained on the representation layer's output."""
    _, _, _, path = token
    model, params, _ = build("representation")
    checkpoints.save(params, model, tmp_path / "r.npz", "npz")
    _, report = checkpoints.load_with_report(tmp_path / "r.npz", variant())
    assert names(report.initialised) == HEAD
    assert {"head/pre_logits/kernel", "head/kernel"} <= set(names(report.ignored))
    loaded, report = checkpoints.load_with_report(path, variant(representation_size=16))
    assert names(report.initialised) == [*HEAD, "head/pre_logits/bias", "head/pre_logits/kernel"]
    assert loaded["head"]["pre_logits"]["kernel"].std() > 0


def test_headless_files_and_bare_backbones(tmp_path, token):
    _, params, _, path = token
    backbone = variant(num_classes=None)
    loaded, report = checkpoints.load_with_report(path, backbone)
    jax.tree.map(np.testing.assert_array_equal, loaded, params["backbone"])
    assert names(report.ignored) == HEAD
    checkpoints.save(loaded, backbone, tmp_path / "headless.npz", "npz")
    _, report = checkpoints.load_with_report(tmp_path / "headless.npz", variant())
    assert names(report.initialised) == HEAD


def test_class_token_to_mean_and_back(tmp_path, token):
    _, params, _, path = token
    mean = variant(pooling="mean")
    loaded, report = checkpoints.load_with_report(path, mean)
    assert "cls" not in loaded["backbone"]
    table = params["backbone"]["pos_embed"]
    np.testing.assert_array_equal(loaded["backbone"]["pos_embed"], table[:, 1:])
    assert names(report.ignored) == ["backbone/cls", "backbone/pos_embed row 0"]
    checkpoints.save(loaded, mean, tmp_path / "mean.npz", "npz")
    back, report = checkpoints.load_with_report(tmp_path / "mean.npz", variant())
    assert not back["backbone"]["cls"].any()
    assert not back["backbone"]["pos_embed"][:, 0].any()
    np.testing.assert_array_equal(back["backbone"]["pos_embed"][:, 1:], table[:, 1:])
    assert names(report.initialised) == ["backbone/cls"]


def test_class_position_folds_into_the_token(token):
    model, params, images, path = token
    target = variant(class_token_position=False)
    loaded = checkpoints.load(path, target)
    logits = jax.jit(target.apply)({"params": loaded}, images)
    np.testing.assert_array_equal(logits, jax.jit(model.apply)({"params": params}, images))


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (4, 8), 24])
def test_square_to_any_grid_and_forward(token, size):
    model, _, _, path = token
    loaded, report = checkpoints.load_with_report(path, model, image_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert loaded["backbone"]["pos_embed"].shape == (1, 1 + height * width // 16, 16)
    assert names(report.resized) == ["backbone/pos_embed"]
    images = np.zeros((1, height, width, 3), np.float32)
    assert np.isfinite(model.apply({"params": loaded}, images)).all()


def test_grids_of_other_shape_need_a_word(tmp_path):
    model, params, _ = build("rectangular")  # 2 x 3 patches
    checkpoints.save(params, model, tmp_path / "c.npz", "npz")
    with pytest.raises(UserError, match="source_grid"):
        checkpoints.load(tmp_path / "c.npz", model, image_size=16)
    _, report = checkpoints.load_with_report(
        tmp_path / "c.npz", model, image_size=16, source_grid=(2, 3)
    )
    assert report.resized == ("backbone/pos_embed: 2x3 to 4x4, corners",)
    with pytest.raises(UserError, match="a source grid of 3x3 is not 6 positions"):
        checkpoints.load(tmp_path / "c.npz", model, image_size=16, source_grid=(3, 3))


def test_patches_and_channels_of_another_size(token):
    _, _, _, path = token
    target = variant(patch_size=6)
    loaded, report = checkpoints.load_with_report(path, target, image_size=18, channels=1)
    assert loaded["backbone"]["patch_embed"]["kernel"].shape == (6, 6, 1, 16)
    assert report.resized == ("backbone/patch_embed/kernel: [4, 4, 3, 16] to [6, 6, 1, 16]",)


def test_sincos_table_stands_for_computed_positions(tmp_path):
    model, params, _ = build("sincos")
    checkpoints.save(params, model, tmp_path / "c.npz", "npz", image_size=12)
    flat = dict(np.load(tmp_path / "c.npz"))
    table = flat["Transformer/posembed_input/pos_embedding"]
    np.testing.assert_array_equal(table, sincos_table((3, 3), 16))
    flat["Transformer/posembed_input/pos_embedding"] = table + 0.01
    np.savez(tmp_path / "other.npz", **flat)
    with pytest.raises(UserError, match="learned positions, but the model has position='sincos2d'"):
        checkpoints.load(tmp_path / "other.npz", model)
    flat["Transformer/posembed_input/pos_embedding"] = positions.sincos_table(3, 3, 16)
    np.savez(tmp_path / "mae.npz", **flat)
    of_mae = variant(pooling="mean", position="sincos2d_mae")
    _, report = checkpoints.load_with_report(tmp_path / "mae.npz", of_mae, image_size=12)
    assert "the sin-cos table that the model computes" in str(report)


def test_anything_unexplained_names_its_keys(tmp_path, token):
    model, _, _, path = token
    flat = dict(np.load(path))
    flat["Transformer/encoderblock_0/Extra_0/kernel"] = np.zeros(1, np.float32)
    del flat["Transformer/encoder_norm/bias"]
    flat["Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"] = np.zeros(5, np.float32)
    np.savez(tmp_path / "c.npz", **flat)
    with pytest.raises(UserError) as error:
        checkpoints.load(tmp_path / "c.npz", model)
    for words in (
        "holds Transformer/encoderblock_0/Extra_0/kernel, which the model has no place for",
        "lacks backbone/norm/bias",
        "backbone/blocks_1/mlp/dense1/bias is [5] and should be [24]",
    ):
        assert words in str(error.value)
    flat["Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"] = np.zeros(24, np.float32)
    np.savez(tmp_path / "c.npz", **flat)
    loaded, report = checkpoints.load_with_report(
        tmp_path / "c.npz", model, ignore=[".*Extra_0.*"], initialise=["backbone/norm/.*"]
    )
    assert (loaded["backbone"]["norm"]["scale"] == 1).all()
    assert names(report.initialised) == ["backbone/norm/bias", "backbone/norm/scale"]
    assert "Transformer/encoderblock_0/Extra_0/kernel" in names(report.ignored)


def test_partial_loads_start_the_rest_anew(token):
    _, _, _, path = token
    target = variant(layer_scale=0.125, num_registers=2)
    with pytest.raises(UserError, match="lacks backbone/blocks_0/scale1"):
        checkpoints.load(path, target)
    loaded = checkpoints.load(path, target, initialise=[".*/scale[12]", "backbone/registers"])
    assert (loaded["backbone"]["blocks"]["scale1"] == 0.125).all()
    assert loaded["backbone"]["registers"].std() > 0
    again = checkpoints.load(
        path, target, initialise=[".*/scale[12]", "backbone/registers"], seed=1
    )
    assert not np.array_equal(loaded["backbone"]["registers"], again["backbone"]["registers"])


def test_models_of_another_size_say_so(token):
    _, _, _, path = token
    with pytest.raises(UserError, match="width 16, but yours has 32"):
        checkpoints.load(path, variant(width=32))
    with pytest.raises(UserError, match="depth 2, but yours has 3; write depth=2"):
        checkpoints.load(path, variant(depth=3))
    with pytest.raises(UserError, match=r"attn/key/bias is \[2, 8\] and should be \[4, 4\]"):
        checkpoints.load(path, variant(num_heads=4))


def test_bad_patterns_are_the_users(token):
    model, _, _, path = token
    with pytest.raises(UserError, match="no regular expression"):
        checkpoints.load(path, model, ignore=["("])


def test_heads_of_other_tasks_start_as_their_model_makes_them(token):
    _, params, _, path = token
    model = models.Segmenter(variant(num_classes=None), 7, pyramid=(2.0,), pyramid_width=8)
    loaded, report = checkpoints.load_with_report(path, model)
    assert loaded["decoder"]["score"]["kernel"].std() > 0
    assert loaded["pyramid"]["level1"]["conv2"]["kernel"].std() > 0
    made = {name.split("/")[0] for name in names(report.initialised)}
    assert made == {"decoder", "pyramid"}
    np.testing.assert_array_equal(loaded["backbone"]["cls"], params["backbone"]["cls"])


@pytest.mark.parametrize(
    ("size", "pooling"), [((16, 24), "token"), ((8, 20), "mean"), ((8, 8), "token")]
)
def test_our_own_checkpoints_know_their_class_row(tmp_path, size, pooling):
    """The number of tokens alone would mislead: 4 x 6 and a class token is 5 x 5."""
    model = variant(pooling=pooling)
    images = np.zeros((1, *size, 3), np.float32)
    params = random_params(model, images)
    checkpoints.save(params, model, tmp_path / "own", "orbax")
    for image_size in (None, size):
        loaded, report = checkpoints.load_with_report(
            tmp_path / "own", model, image_size=image_size
        )
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert not report.resized


def test_a_run_knows_the_grid_of_its_images(tmp_path):
    """16 positions of 8×32 pixels, which would pass for a square."""
    model = variant()
    params = random_params(model, np.zeros((1, 8, 32, 3), np.float32))
    checkpoints.save(params, model, tmp_path / "run/checkpoints", "orbax")
    square = {"patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
    record = {
        "config": {"model": {"name": "vit", **square}},
        "data_info": {"spec": {"image": {"shape": [8, 32, 3], "dtype": "uint8"}}},
    }
    with pytest.raises(UserError, match="either 4x4 or 2x8"):
        checkpoints.load(tmp_path / "run", model, image_size=(8, 32))
    (tmp_path / "run/config.json").write_text(json.dumps(record))
    same = checkpoints.load(tmp_path / "run", model, image_size=(8, 32))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    report = checkpoints.load_with_report(tmp_path / "run", model, image_size=(16, 16))[1]
    assert any("2x8 to 4x4" in line for line in report.resized)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, {"class_token": True, "position": None, "num_kv_heads": 2, "rope_base": 50.0}),
        ({"pooling": "map"}, {"map_heads": 2, "map_mlp_dim": 24, "class_token": False}),
        ({"mlp": "swiglu"}, {"activation": "silu", "pool_prefix": True}),
        ({"position": "rope"}, {"rope_base": 100.0, "class_token_position": False}),
    ],
)
def test_what_computes_the_same_is_no_difference(fields, told):
    model = variant(num_classes=None, **fields)
    images = np.zeros((1, 8, 8, 3), np.float32)
    arrays = from_params(random_params(model, images), model)
    weights = Weights(arrays=arrays, format="a file", fields=told)
    assert loading.fit(weights, model, "", image_size=8)[1].notes == ()
    other = dataclasses.replace(weights, fields={**told, "norm_epsilon": 1e-5})
    (note,) = loading.fit(other, model, "", image_size=8)[1].notes
    assert note == "its own model has norm_epsilon=1e-05; yours has norm_epsilon=1e-06"
