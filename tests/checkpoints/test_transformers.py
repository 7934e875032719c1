"""Models of transformers and open_clip, against what those libraries computed (record_hf.py)."""

import dataclasses
import json
import shutil
from pathlib import Path

import golden_cases
import jax
import numpy as np
import pytest

from vit_jax import checkpoints, models
from vit_jax.checkpoints import array_files, files, loading
from vit_jax.checkpoints.formats._hf import by_model_type
from vit_jax.errors import UserError
from vit_jax.inference import convert
from vit_jax.inference.features import Embedder
from vit_jax.inference.predict import Predictor
from vit_jax.models import hub

GOLDEN = Path(__file__).parent.parent / "golden" / "hf_tiny"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/io.npz"))
# `test_two_towers.py` has these together with their text towers.
CASES = [case for case in CASES if case not in ("aimv2_lit", "open_clip_siglip", "siglip2")]
CASES.remove("yolos")  # `test_detectors.py` has it.


def output_of(model, params, images):
    with jax.default_matmul_precision("highest"):
        out = jax.jit(model.apply)({"params": params}, images)
    if not hasattr(out, "grid"):
        return out
    return out.grid.mean((1, 2)) if out.pooled is None else out.pooled


@pytest.mark.parametrize("case", CASES)
def test_a_folder_computes_what_the_real_library_computed(case):
    model, params, _ = convert.open_model(str(GOLDEN / case))
    images = np.load(GOLDEN / "images.npz")["images"]
    expected = np.load(GOLDEN / case / "io.npz")["output"]
    actual = output_of(model, params, images)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", ["clip_vision", "dinov2", "siglip_vision"])
def test_an_image_file_has_the_features_of_the_library_with_its_own_processor(case):
    """Both sides resize with Pillow to whole numbers, so that only rounding differs afterwards."""
    predictor = Predictor.from_checkpoint(str(GOLDEN / case), headless=True)
    (batch,) = predictor.batches([str(GOLDEN / "photo.png")])
    with jax.default_matmul_precision("highest"):
        actual = Embedder(predictor.task, predictor.params)(batch["image"])
    expected = np.load(GOLDEN / case / "io.npz")["photo"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "case",
    [
        *("aimv2", "aimv2_head", "beit", "clip_vision", "ijepa"),
        "dinov2",
        "dinov2_classifier",
        "dinov2_registers",
        "dinov3",
        "dinov3_gated",
        "siglip_vision",
        "vit",
    ],
)
def test_an_export_has_the_arrays_and_the_config_of_the_real_library(case, tmp_path):
    model, params, (*size, _) = convert.open_model(str(GOLDEN / case))
    checkpoints.save(params, model, tmp_path / "out", "hf", image_size=size)
    ours, theirs = (
        array_files.read_arrays(folder / "model.safetensors")
        for folder in (tmp_path / "out", GOLDEN / case)
    )
    ours, theirs = (
        {name.removeprefix("vision_model."): array for name, array in arrays.items()}
        for arrays in (ours, theirs)
    )
    assert {name for name in theirs if "mask_token" not in name} == ours.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    ours, theirs = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "out", GOLDEN / case)
    )
    untold = {"dtype", "torch_dtype", "label2id", "id2label", "layer_scale_init_value"}
    for key in ours.keys() & theirs.keys() - untold:
        assert ours[key] == theirs[key], key


# A name on the hub for each recorded case: the two differ in sizes alone.
NAMED = {
    "aimv2": "apple/aimv2-large-patch14-224",
    "beit": "microsoft/beit-base-patch16-224",
    "clip_vision": "openai/clip-vit-base-patch32",
    "deit_distilled": "facebook/deit-base-distilled-patch16-224",
    "dinov2": "facebook/dinov2-base",
    "dinov2_giant": "facebook/dinov2-giant",
    "dinov2_registers": "facebook/dinov2-with-registers-base",
    "dinov3": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3_gated": "facebook/dinov3-vith16plus-pretrain-lvd1689m",
    "open_clip": "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "open_clip_coca": "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
    "siglip": "google/siglip2-base-patch16-224",
    "vit": "google/vit-base-patch16-224",
}
SIZES = {"width", "depth", "num_heads", "mlp_dim", "patch_size", "layer_scale"}
SIZES |= {"map_dim", "map_heads"}


def fields_of(model):
    # An activation means nothing to an MLP with a gate.
    ignored = SIZES | {"class_token", "class_token_position"}
    ignored |= {"parent", "name", *(("activation",) if model.mlp == "swiglu" else ())}
    names = {field.name for field in dataclasses.fields(model)} - ignored
    return {name: getattr(model, name) for name in names}


@pytest.mark.parametrize("case", NAMED)
def test_a_name_of_the_hub_is_the_model_of_its_folder(case):
    recorded = models.build(**checkpoints.model_config(GOLDEN / case))
    assert fields_of(models.build(NAMED[case])) == fields_of(recorded)


def test_a_mistyped_name_of_the_hub_is_answered_by_the_nearest():
    with pytest.raises(UserError, match="did you mean 'facebook/dinov2-base'"):
        models.build("facebook/dinov2-bas")


def test_the_table_of_the_hub_has_the_published_sizes():
    for name, millions in {
        "facebook/dinov2-base": 86,
        "facebook/dinov2-giant": 1135,
        "facebook/dinov3-vith16plus-pretrain-lvd1689m": 841,
        "google/siglip-so400m-patch14-384": 428,
        "apple/aimv2-large-patch14-224": 309,
    }.items():
        assert round(models.param_count(models.build(name), 224) / 1e6) == millions
    for name in hub.VARIANTS:
        models.build(name)


# What the published configs leave out, since it is the default of their class.
DEFAULTS = {
    "owlvit": {"image_size": 768, "patch_size": 32, "layer_norm_eps": 1e-5},
    "owlv2_vision_model": {"image_size": 768, "patch_size": 16},
    "siglip2": {"num_patches": 256, "patch_size": 16},
    "vit_msn": {"layer_norm_eps": 1e-6, "patch_size": 16},
    "dinov2": {"layer_norm_eps": 1e-6, "patch_size": 14},
    "dinov2_with_registers": {"patch_size": 16},
    "vit": {"layer_norm_eps": 1e-12, "image_size": 224},
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_config_may_leave_out_the_defaults_of_its_own_class(kind):
    settings = by_model_type(kind).settings({"model_type": kind})
    assert {key: settings[key] for key in DEFAULTS[kind]} == DEFAULTS[kind]


@pytest.mark.parametrize(
    ("case", "how"),
    [
        *(("vit", "torch_bicubic"), ("dinov2", "torch_bicubic"), ("dinov2_registers", "bicubic")),
        *(("siglip_vision", "torch_bicubic"), ("siglip2_naflex", "bilinear")),
        ("open_clip", "bicubic"),
    ],
)
def test_positions_are_resized_as_the_family_resizes_them(case, how):
    assert loading.read_weights(GOLDEN / case).interpolation == how


def changed(case, folder, name, **keys):
    """Returns a copy of a recorded folder with other settings in its config."""
    shutil.copytree(GOLDEN / case, folder / case)
    file = folder / case / name
    stored = json.loads(file.read_text())
    section = stored["model_cfg"]["vision_cfg"] if "model_cfg" in stored else stored
    section.update(keys)
    file.write_text(json.dumps(stored))
    return folder / case


def test_a_gate_is_silu_or_refused(tmp_path):
    folder = changed("dinov3_gated", tmp_path, "config.json", hidden_act="gelu")
    with pytest.raises(UserError, match="hidden_act='gelu' is no gate"):
        loading.read_weights(folder)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"scale_heads": True}, "scale_heads=True is not read"),
        ({"attentional_pool": "parallel"}, "attentional_pool='parallel' is read as True"),
        ({"attentional_pool": True, "pool_type": "avg"}, "with pool_type='tok'"),
        ({"pool_type": "last"}, "pool_type='last' is no pooling"),
    ],
)
def test_a_setting_of_open_clip_is_read_or_refused(tmp_path, keys, words):
    folder = changed("open_clip", tmp_path, "open_clip_config.json", **keys)
    with pytest.raises(UserError, match=words):
        loading.read_weights(folder)


@pytest.fixture
def siglip_of_open_clip(tmp_path):
    """A folder of open_clip whose tower is timm's recorded SigLIP, and what it computes."""
    recorded = GOLDEN.parent / "timm_tiny" / "vit_base_patch16_siglip_224"
    state = array_files.read_arrays(recorded / "model.safetensors")
    bias = state.pop("head.bias")
    state = {f"visual.trunk.{name}": array for name, array in state.items()}
    state["visual.head.proj.weight"] = state.pop("visual.trunk.head.weight")
    tower = {"timm_model_name": recorded.name, "timm_pool": "map", "timm_proj": "linear"}
    config = {"model_cfg": {"embed_dim": 3, "vision_cfg": tower | {"image_size": 16}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    files.write_safetensors(tmp_path / "open_clip_model.safetensors", state)
    io = golden_cases.load_timm(recorded.name)
    return tmp_path, io["images"], io["outputs"] - bias


def test_a_tower_of_timm_in_open_clip_computes_what_timm_computed(siglip_of_open_clip):
    folder, images, expected = siglip_of_open_clip
    # The recorded model is narrower than the one of that name.
    model, params, _ = convert.open_model(str(folder), fields={"num_heads": 2})
    actual = output_of(model, params, images)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_tower_of_timm_without_a_place_is_refused(siglip_of_open_clip):
    folder = siglip_of_open_clip[0]
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "convnext_base"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="timm_model_name='convnext_base' is no model"):
        loading.read_weights(folder)


@pytest.mark.parametrize("case", ["beit", "clip", "dinov3_gated", "open_clip", "open_clip_coca"])
def test_a_file_beside_its_config_is_read_with_it(case, tmp_path):
    (file,) = (GOLDEN / case).glob("*.safetensors")
    folder, alone = loading.read_weights(GOLDEN / case), loading.read_weights(file)
    assert (alone.fields, alone.notes, alone.grid) == (folder.fields, (), folder.grid)
    assert {n: x.shape for n, x in alone.arrays.items()} == {
        name: array.shape for name, array in folder.arrays.items()
    }
    # One of another model is not believed.
    shutil.copytree(GOLDEN / case, tmp_path / "of_other")
    path = tmp_path / "of_other" / min((GOLDEN / case).glob("*config.json")).name
    other = {
        "config.json": GOLDEN / "aimv2_head",
        "open_clip_config.json": GOLDEN / "open_clip_clipa",
    }
    shutil.copy(other[path.name] / path.name, path)
    assert "without its config.json" in loading.read_weights(path.parent / file.name).notes[0]


def test_a_part_of_a_checkpoint_leads_to_its_folder(tmp_path):
    folder = shutil.copytree(GOLDEN / "vit", tmp_path / "vit")
    part = folder / "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": part.name}}))
    assert loading.read_weights(index).fields == loading.read_weights(GOLDEN / "vit").fields
    with pytest.raises(UserError, match="one of several files of a checkpoint; give their folder"):
        loading.read_weights(part)
