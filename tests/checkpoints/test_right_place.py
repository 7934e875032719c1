"""Images as each origin's library prepares them, kernels that adapters find, and plain errors."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax import models
from vit_jax.checkpoints import files, input_spec, loading
from vit_jax.checkpoints.fit.inference import infer_config
from vit_jax.errors import UserError
from vit_jax.inference.preparation import fit
from vit_jax.models import lora

GOLDEN = Path(__file__).parent.parent / "golden"
HF, TIMM = GOLDEN / "hf_tiny", GOLDEN / "timm_tiny"


def test_images_are_those_of_the_processor_of_each_origin(tmp_path):
    """Both sides resize with Pillow to whole numbers; after that only float32 rounds."""
    recorded = dict(np.load(HF / "processors.npz"))
    photo = np.asarray(Image.open(HF / "photo.png").convert("RGB"))
    for origin, beside in json.loads(str(recorded.pop("described"))).items():
        folder = tmp_path / origin
        folder.mkdir()
        for name, content in beside.items():
            (folder / name).write_text(json.dumps(content))
        spec = input_spec.read(folder)
        actual = (fit(photo, spec) - np.array(spec.mean)) / np.array(spec.std)
        np.testing.assert_allclose(actual, recorded.pop(origin), atol=1e-5, err_msg=origin)
    assert not recorded


@pytest.mark.parametrize(
    "origin",
    [
        *("hf_tiny/dinov2", "hf_tiny/dinov3", "hf_tiny/clip", "hf_tiny/siglip2", "hf_tiny/beit"),
        *("hf_tiny/mae", "timm_tiny/eva02_base_patch14_224"),
    ],
)
def test_adapters_find_the_kernels_of_every_origin(origin):
    weights = loading.read_weights(GOLDEN / origin)
    found = [n for n in weights.arrays if re.fullmatch(lora.ATTENTION_AND_MLP, n)]
    fields = infer_config(weights)
    layers = {"query", "key", "value", "out", "dense1", "dense2"}
    layers |= {"gate"} if fields["mlp"] == "swiglu" else set()
    wanted = {(str(i), layer) for i in range(fields["depth"]) for layer in layers}
    assert {tuple(re.search(r"blocks_(\d+)/\w+/(\w+)", n).groups()) for n in found} == wanted
    assert all(name.startswith("backbone/") for name in found)


def copied(path, folder):
    """Returns a copy of a file away from its config."""
    return shutil.copy(path, folder)


def fitted(path, **fields):
    """Loads a file into the model that it tells of, with some fields replaced."""
    weights = loading.read_weights(path)
    heads = {"num_heads": fields.get("num_heads", 2)}
    model = models.build(**{**infer_config(weights, **heads), "num_classes": None, **fields})
    return loading.fit(weights, model, str(path))[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pre_norm": False}, "holds backbone/pre_norm/bias"),
        ({"patch_bias": True}, "lacks backbone/patch_embed/bias"),
        ({"last_norm": False}, "holds backbone/norm/bias"),
        ({"num_heads": 4}, r"query/bias is \[2, 16\] and should be \[4, 8\]"),
    ],
)
def test_what_changes_the_output_is_never_offered_to_be_left_out(fields, words):
    with pytest.raises(UserError, match=words) as caught:
        fitted(HF / "clip_vision" / "model.safetensors", **fields)
    assert "Build the model that the checkpoint was trained as" in str(caught.value)
    assert "ignore=" not in str(caught.value) or "num_heads" in fields


def test_siglip_alone_is_told_no_false_note(tmp_path):
    file = copied(HF / "siglip_vision" / "model.safetensors", tmp_path)
    report = fitted(file, num_heads=2)
    (note,) = report.notes
    assert "activation='gelu_tanh'" in note
    assert "its own model has" not in note
    notes = fitted(file, num_heads=2, activation="gelu").notes
    assert "its own model has activation='gelu_tanh'; yours has activation='gelu'" in notes[1]


@pytest.mark.parametrize("lost", ["attn/query/kernel", "mlp/dense1/kernel"])
def test_an_array_that_is_missing_is_named(lost):
    weights = loading.read_weights(HF / "vit")
    del weights.arrays[f"backbone/blocks_0/{lost}"]
    with pytest.raises(UserError, match=f"lacks backbone/blocks_0/{lost}, which every model has"):
        infer_config(weights)


def test_a_folder_of_timm_with_another_model_names_it(tmp_path):
    folder = shutil.copytree(TIMM / "vit_base_patch16_224", tmp_path / "timm")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "architecture": "convnext_base"}))
    assert "its config.json names 'convnext_base'" in loading.read_weights(folder).notes[0]
    files.write_safetensors(folder / "model.safetensors", {"stem.0.weight": np.ones((4, 3))})
    with pytest.raises(UserError, match="timm's 'convnext_base' is no model of this package"):
        loading.read_weights(folder)


def test_a_class_token_is_not_taken_for_pooling_by_it():
    for file, pooling in (("hf_tiny/beit", "mean"), ("hf_tiny/open_clip_coca", "map")):
        found = infer_config(loading.read_weights(GOLDEN / file))
        assert (found["pooling"], found["class_token"]) == (pooling, True)


def test_a_name_of_timm_that_is_mistyped_is_answered_by_the_nearest():
    with pytest.raises(UserError, match="did you mean 'vit_base_patch16_clip_224"):
        models.build("timm/vit_base_patch16_clip_224.openia")
