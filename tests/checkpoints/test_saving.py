"""Writing other codebases' files: what comes back is what went out, or the reason is given."""

import os

import jax
import numpy as np
import pytest
from models_to_save import MODELS, build

from vit_jax import checkpoints, models
from vit_jax.checkpoints import FORMATS, files, loading
from vit_jax.checkpoints.fit.inference import infer_model
from vit_jax.checkpoints.formats._timm_export import ratio
from vit_jax.errors import UserError
from vit_jax.inference.convert import open_model
from vit_jax.models import traits
from vit_jax.models.vit import VisionTransformer

ENDINGS = {
    "npz": ".npz",
    "big_vision": ".npz",
    "timm": ".safetensors",
    "hf": "",
    "open_clip": "",
    "orbax": "",
    "bit": ".npz",
}
PAIRS = [(name, to) for name, row in MODELS.items() for to in row[3].split()]
PAIRS += [(name, "orbax") for name in list(MODELS)[::5]]  # It keeps any tree of arrays.

# Here a class token's position moves into the class token, or a row for it is made: the function
# is the same, the arrays are not.
MOVES_A_ROW = {
    ("token", "big_vision"),
    ("rectangular", "big_vision"),
    ("headless", "big_vision"),
    ("odd_mlp", "big_vision"),
    ("grey", "big_vision"),
    ("representation", "big_vision"),
    ("registers", "timm"),
}


@pytest.mark.parametrize(("name", "to"), PAIRS)
def test_round_trip(tmp_path, name, to):
    model, params, images = build(name)
    path = tmp_path / f"c{ENDINGS[to]}"
    size = images.shape[1:3]
    checkpoints.save(params, model, path, to, image_size=size)
    back, report = checkpoints.load_with_report(path, model, image_size=size)
    assert not report.initialised
    if to == "timm":
        moved = {"position"} if name == "sincos" else {"class_token_position"}
        moved &= {"position"} if (name, to) not in MOVES_A_ROW else {*moved}
        assert_tells_its_model(path, model, moved)
    if (name, to) in MOVES_A_ROW:
        apply = jax.jit(model.apply)
        before, after = (apply({"params": p}, images) for p in (params, back))
        jax.tree.map(np.testing.assert_array_equal, after, before)
    else:
        jax.tree.map(np.testing.assert_array_equal, back, params)


def assert_tells_its_model(path, model, moved):
    """The model that a file is taken for computes what the one that it was written from does."""
    told = infer_model(loading.read_weights(path))
    sides = [
        models.effective_fields(models.fields_of(models.backbone_of(m))) for m in (told, model)
    ]
    for side in sides:
        side["layer_scale"] = side.get("layer_scale") is not None
        for name in {"scan", *moved}:
            side.pop(name, None)
    assert sides[0] == sides[1]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_format_cannot_express_is_refused(tmp_path, name):
    model, params, _ = build(name)
    allowed = MODELS[name][3].split()
    for to in FORMATS.names():
        if to not in (*allowed, "orbax") and FORMATS.find(to).write:
            path = tmp_path / f"{to}{ENDINGS[to]}"
            with pytest.raises(UserError, match=f"{to} has no place for .*; write --to=.*orbax"):
                checkpoints.save(params, model, path, to, image_size=12)
            assert not path.exists()


def text(pooling="last"):
    return models.build("text", width=8, depth=1, num_heads=1, pooling=pooling)


def towers(image=None, words=None, **fields):
    image = image or models.build("vit_ti16", depth=1)
    return models.TwoTowers(image, words or text(), 8, 4, **fields)


# name: (model, a format, what it lacks of the model, and what has it)
TOWERS = {
    "sigmoid": (towers(bias_init=-10.0), "npz", "the sigmoid loss's bias; .*big_vision"),
    "map": (towers(words=text("map")), "big_vision", "map pooling of texts; .*=orbax"),
    "last": (towers(), "timm", "a text tower, last pooling of texts; .*big_vision or npz"),
    "first": (towers(words=text("first")), "npz", "first pooling of texts; .*=big_vision or"),
    "mean": (towers(words=text("mean")), "npz", "mean pooling of texts; .*=big_vision or"),
    "unpooled": (
        towers(models.build("vit_ti16", pooling="none")),
        "npz",
        "no pooling beside a text tower",
    ),
    "mixer": (towers(models.build("mixer_b16")), "npz", "a Mixer beside a text tower"),
    "other text": (
        towers(words=models.build("vit_ti16")),
        "npz",
        "a ViT that reads texts; ",
    ),
}


@pytest.mark.parametrize("case", TOWERS)
def test_towers_without_a_place_are_named(tmp_path, case):
    model, to, lacking = TOWERS[case]
    with pytest.raises(UserError, match=f"{to} has no place for {lacking}"):
        checkpoints.save({}, model, tmp_path / f"c{ENDINGS[to]}", to)


def test_published_names(tmp_path):
    model, params, _ = build("token")
    checkpoints.save(params, model, tmp_path / "c.npz", "npz")
    with np.load(tmp_path / "c.npz") as stored:
        names = set(stored.files)
        assert stored["Transformer/posembed_input/pos_embedding"].shape == (1, 10, 16)
    block = "Transformer/encoderblock_1"
    assert {
        "cls",
        "embedding/kernel",
        f"{block}/LayerNorm_0/scale",
        f"{block}/MultiHeadDotProductAttention_1/query/kernel",
        f"{block}/LayerNorm_2/bias",
        f"{block}/MlpBlock_3/Dense_1/kernel",
        "Transformer/encoder_norm/scale",
        "head/kernel",
    } <= names
    assert len(names) == 2 * 16 + 2 + 1 + 1 + 2 + 2


def test_big_vision_names(tmp_path):
    model, params, _ = build("map")
    text = checkpoints.save(params, model, tmp_path / "c.npz", "big_vision")
    with np.load(tmp_path / "c.npz") as stored:
        names = set(stored.files)
    block = "params/Transformer/encoderblock_0"
    assert {
        "params/pos_embedding",
        f"{block}/MultiHeadDotProductAttention_0/out/kernel",
        f"{block}/LayerNorm_1/scale",
        f"{block}/MlpBlock_0/Dense_0/kernel",
        "params/MAPHead_0/probe",
        "params/MAPHead_0/MlpBlock_0/Dense_1/bias",
    } <= names
    assert "pool_type='map'" in text


def test_the_call_says_what_timm_would_get_wrong(tmp_path):
    model, params, _ = build("mean")
    text = checkpoints.save(params, model, tmp_path / "c.safetensors", "timm")
    for argument in (
        "act_layer='gelu_tanh'",
        "global_pool='avg'",
        "class_token=False",
        "fc_norm=False",
        "img_size=(12, 12)",
    ):
        assert argument in text
    model, params, _ = build("representation")
    assert "pre_logits" in checkpoints.save(params, model, tmp_path / "c.npz", "npz")


def test_a_representation_layer_without_a_head_is_spoken_of(tmp_path, caplog):
    model, params, images = build("representation")
    path = tmp_path / "c.npz"
    checkpoints.save(params, model, path, "npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file if not name.startswith("head/")}
    np.savez(path, **arrays)
    open_model(str(path), fields={"num_heads": 2})
    assert "write --model.representation_size=12 for those behind it" in caplog.text
    caplog.clear()
    hidden, found, _ = open_model(str(path), fields={"num_heads": 2, "representation_size": 12})
    expected = model.clone(num_classes=0).apply({"params": params}, images)
    np.testing.assert_allclose(hidden.apply({"params": found}, images).pooled, expected.pooled)
    assert not caplog.text


def test_ratio_gives_the_mlp_dim_back():
    for width in (16, 192, 1152, 1408, 1664):
        for mlp_dim in (37, 4304, 4 * width, 8192, 15360):
            assert int(width * ratio(mlp_dim, width)) == mlp_dim


def test_image_sizes_that_cannot_be_are_refused(tmp_path):
    model, params, _ = build("rectangular")
    with pytest.raises(UserError, match=r"image_size=\(height, width\)"):
        checkpoints.save(params, model, tmp_path / "c.safetensors", "timm")
    with pytest.raises(UserError, match="makes 9 patches, the model has 6"):
        checkpoints.save(params, model, tmp_path / "c.safetensors", "timm", image_size=12)
    for size in ("12", True, (8, 12.0)):
        with pytest.raises(UserError, match=r"image_size=.*: write a side in pixels, or"):
            checkpoints.save(params, model, tmp_path / "c.safetensors", "timm", image_size=size)
    sizes = np.array([8, 12])
    text = checkpoints.save(params, model, tmp_path / "c.safetensors", "timm", image_size=sizes)
    assert "img_size=(8, 12)" in text
    model, params, _ = build("no_positions")
    text = checkpoints.save(
        params, model, tmp_path / "c.safetensors", "timm", image_size=np.int64(12)
    )
    assert "img_size=(12, 12)" in text
    with pytest.raises(UserError, match="written out as a table"):
        checkpoints.save(params, model, tmp_path / "c.npz", "npz")


def test_unknown_formats_and_wrong_endings(tmp_path):
    model, params, _ = build("token")
    with pytest.raises(UserError, match="did you mean 'timm'"):
        checkpoints.save(params, model, tmp_path / "c", "tim")
    with pytest.raises(UserError, match=r"ends in \.npz"):
        checkpoints.save(params, model, tmp_path / "c.safetensors", "npz")


def test_directories_are_not_overwritten(tmp_path):
    model, params, _ = build("token")
    for to in ("hf", "orbax"):
        checkpoints.save(params, model, tmp_path / to, to)
        with pytest.raises(UserError, match="exists"):
            checkpoints.save(params, model, tmp_path / to, to)


@pytest.mark.parametrize("to", ["npz", "timm"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, to):
    model, params, _ = build("token")
    path = tmp_path / f"c{ENDINGS[to]}"
    checkpoints.save(params, model, path, to)
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoints.save(jax.tree.map(np.negative, params), model, path, to)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_failed_directory_leaves_nothing(tmp_path, monkeypatch):
    model, params, _ = build("token")
    monkeypatch.setattr(files, "safetensors_bytes", lambda arrays: "not bytes")
    with pytest.raises(TypeError):
        checkpoints.save(params, model, tmp_path / "hf", "hf")
    assert not any(tmp_path.iterdir())


def test_formats_list_traits_that_models_have():
    """A trait that formats list and no model has would be a misspelling."""
    formats = [FORMATS.find(name) for name in FORMATS.names()]
    listed = set().union(*(part.expresses or () for part in formats))
    listed = listed.union(*(kind for part in formats for kind in part.alternatives))
    every = [build(name)[0] for name in MODELS] + [model for model, *_ in TOWERS.values()]
    rotary = {"position_table": True, "rope_grid": (7, 7), "rope_offset": 1.0, "rope_base": 50.0}
    rotary |= {"rope_columns_first": True, "rope_interleaved": True, "key_bias": False}
    for kind in ("rope", "rope_dinov3", "rope_mixed"):
        every.append(models.build("vit_ti16", position=kind, **rotary))
    for kind in ("table", "shared_table", "mlp", "shared_mlp"):
        every.append(models.build("vit_ti16", position_bias=kind))
    half = {"layer_scale": 1.0, "mlp_layer_scale": False, "pooling": "map", "map_heads": 1}
    every += [models.build("vit_ti16", **more) for more in (half, {"num_kv_heads": 1})]
    every.append(models.build("vit_ti16", differential=True))
    clip = {"pooling": "end", "causal": True, "end_token": 7}
    aimv2 = {"norm": "rmsnorm", "mlp": "swiglu"}
    aimv2 |= {"qkv_bias": False, "proj_bias": False, "mlp_bias": False}
    image = models.build("vit_ti16", pooling="map", map_mlp=False, **aimv2)
    every += [towers(words=text().clone(**clip)), towers(image, text().clone(**aimv2))]
    assert listed <= set().union(*(models.traits_of(model).all_named for model in every))


class Odd(VisionTransformer):
    """A model of a user's own that adds nothing to its traits."""

    bump: float = 0.0


class Named(VisionTransformer):
    """A model of a user's own that is a ViT with another start."""

    def traits(self):
        return super().traits()


@pytest.mark.parametrize("to", ["npz", "big_vision", "timm", "hf"])
def test_what_is_new_in_a_model_is_refused_by_its_name(tmp_path, to, monkeypatch):
    tiny = {"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2}
    path = tmp_path / f"c{ENDINGS[to]}"
    if to != "timm":
        with pytest.raises(UserError, match=f"{to} has no place for position='rope_mixed'; "):
            checkpoints.save({}, models.build("vit", position="rope_mixed", **tiny), path, to)
    with pytest.raises(UserError, match=f"{to} has no place for a Odd; "):
        checkpoints.save({}, Odd(**tiny), path, to)
    assert models.traits_of(Named(**tiny)) == models.traits_of(models.build("vit", **tiny))
    # A field that somebody adds to the ViT, and a value that somebody adds to a field.
    monkeypatch.delitem(traits.VIT_NAMES, "num_registers")
    monkeypatch.setitem(traits.VIT_NAMES, "norm", {"layernorm": ""})
    model = models.build("vit", num_registers=2, norm="rmsnorm", **tiny)
    with pytest.raises(UserError, match="norm='rmsnorm', num_registers=2"):
        checkpoints.save({}, model, path, to)


def test_heads_and_text_towers_alone_are_refused(tmp_path):
    segmenter = models.Segmenter(models.build("vit_ti16"), 3)
    for model, words in ((segmenter, "the head of a Segmenter"), (text(), "a text tower alone")):
        with pytest.raises(UserError, match=f"npz has no place for .*{words}; write --to=orbax"):
            checkpoints.save({}, model, tmp_path / "c.npz", "npz")
