"""Tiny models of every kind of timm's, against outputs of timm (tests/interop/record_timm.py)."""

import json

import flax.linen as nn
import golden_cases
import jax
import numpy as np
import pytest

from vit_jax import checkpoints, models
from vit_jax.checkpoints import array_files, files, loading
from vit_jax.checkpoints.fit.inference import infer_model
from vit_jax.checkpoints.formats import timm
from vit_jax.checkpoints.formats._timm import BUFFERS
from vit_jax.errors import UserError
from vit_jax.models import timm_names

TINY = golden_cases.GOLDEN / "timm_tiny"
KINDS = sorted(path.parent.name for path in TINY.glob("*/io.npz"))
FOUND_BY_FILE = ("bit", "hybrid")  # They have no config; the file tells all but the heads.


def outputs(model, params, images):
    """Returns logits, compiled without the optimizations that cost more time than they save."""
    apply = jax.jit(lambda p, x: model.apply({"params": p}, x))
    with jax.default_matmul_precision("highest"):
        lowered = apply.lower(params, images)
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(params, images)


@pytest.mark.parametrize("kind", KINDS)
def test_timm_computes_the_same(kind):
    stored = golden_cases.load_timm(kind)
    path, size = str(TINY / kind), stored["images"].shape[1:3]
    heads = {"num_heads": 2} if kind == "hybrid" else {}
    if kind in FOUND_BY_FILE:
        path = f"{path}/model.safetensors"
    weights = loading.read_weights(path)
    model = infer_model(weights, **heads)
    params, report = loading.fit(weights, model, path, image_size=size)
    assert not report.initialised
    assert bool(report.notes) == (kind == "hybrid")
    actual = outputs(model, params, stored["images"])
    largest = np.abs(stored["outputs"]).max()
    np.testing.assert_allclose(actual, stored["outputs"], rtol=0, atol=1e-5 * largest)


# Kinds of which timm has files under the same names, or joins what this package writes apart.
WRITTEN = {
    "beit_base_patch16_224": "",
    "deit_base_distilled_patch16_224": "",
    "eva02_base_patch14_224": "attn",
    "eva_giant_patch14_224": "",
    "vit_base_patch16_dinov3_qkvb": "",
    "vit_base_patch16_rope_mixed_ape_224": "",
    "vit_dpwee_patch16_reg1_gap_256": "",
    "vit_dwee_patch16_reg1_gap_256": "",
    "vit_large_patch16_sapiens2": "attn",
    "vit_pe_core_base_patch16_224": "",
    "vit_pwee_patch16_reg1_gap_256": "",
    "vit_relpos_base_patch16_clsgap_224": "",
    "vit_srelpos_medium_patch16_224": "",
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_models_of_other_classes_are_written_in_timms_names(tmp_path, kind):
    """They come back without a word, under the names of the file that timm itself wrote."""
    path, file = TINY / kind, tmp_path / "c.safetensors"
    weights = loading.read_weights(path)
    model = infer_model(weights)
    params, _ = loading.fit(weights, model, str(path), take=True)
    size = json.loads((path / "config.json").read_text())["model_args"].get("img_size")
    text = checkpoints.save(params, model, file, "timm", image_size=size)
    assert "timm.models.load_checkpoint(model, " in text
    back = loading.read_weights(file)
    assert infer_model(back) == model
    again, _ = loading.fit(back, model, str(file), take=True)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    theirs, ours = (
        {n for n in array_files.read_arrays(one) if not (WRITTEN[kind] and WRITTEN[kind] in n)}
        for one in (path / "model.safetensors", file)
    )
    assert ours == {name for name in theirs if not BUFFERS.fullmatch(name)}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"position": "rope"}, "Eva has no activation='gelu_tanh'"),
        ({"last_norm": True, "fc_norm": True}, "its plain ViT has no last_norm=True with fc_norm"),
    ],
)
def test_what_timm_has_only_together_is_refused_with_the_reason(tmp_path, fields, reason):
    model, params = tiny(8, 8, **fields)
    with pytest.raises(UserError, match=f"timm has no place .*{reason}.*; write --to=orbax"):
        checkpoints.save(params, model, tmp_path / "c.safetensors", "timm")


def tiny(height, width, **fields):
    """Returns a tiny model for images of a size, and parameters of zeros."""
    sizes = {"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2}
    model = models.build("vit", **sizes, **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, height, width, 3)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nn.meta.unbox(shapes)["params"])
    return model, zeros


RELATIVE = {"position": "none", "position_bias": "table", "pooling": "mean"}


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        (RELATIVE, "init_values=None"),
        ({"parallel": True, "last_norm": False}, "final_norm=False"),
    ],
)
def test_what_timm_has_by_default_may_be_absent(tmp_path, fields, argument):
    model, params = tiny(8, 8, **fields)
    file = tmp_path / "c.safetensors"
    assert argument in checkpoints.save(params, model, file, "timm")
    found = infer_model(loading.read_weights(file))
    told, wanted = (models.effective_fields(models.fields_of(one)) for one in (found, model))
    assert {**told, "scan": wanted["scan"]} == wanted


def test_a_table_of_offsets_that_is_not_square_needs_the_size_of_images(tmp_path):
    model, params = tiny(4, 12, **RELATIVE)
    file = tmp_path / "c.safetensors"
    with pytest.raises(UserError, match="does not tell the size of its images; write image_size="):
        checkpoints.save(params, model, file, "timm")
    with pytest.raises(UserError, match="makes 15 offsets, the model has 5"):
        checkpoints.save(params, model, file, "timm", image_size=(8, 12))
    text = checkpoints.save(params, model, file, "timm", image_size=(4, 12))
    assert "img_size=(4, 12)" in text


# The architectures of timm that are no models of this package.
REFUSED = {
    *(f"cait_{size}" for size in ("m36_384", "m48_448", "s24_224", "s24_384", "s36_384")),
    *(f"cait_{size}" for size in ("xs24_384", "xxs24_224", "xxs24_384", "xxs36_224", "xxs36_384")),
    *("samvit_base_patch16", "samvit_large_patch16", "samvit_huge_patch16"),
    *("gmixer_24_224", "gmlp_s16_224"),
}


def test_every_other_name_of_timm_is_a_model():
    refused = set()
    for name in timm_names.table():
        try:
            models.build(name, num_classes=3)
        except UserError:
            refused.add(name)
    assert refused == REFUSED
    names = {name: len(row["tags"]) for name, row in timm_names.table().items()}
    assert sum(names.values()) == 510


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_base_patch16_224", {"width": 768, "patch_size": 16, "activation": "gelu"}),
        ("timm/vit_base_patch16_clip_224.openai", {"pre_norm": True, "norm_epsilon": 1e-5}),
        ("vit_large_patch14_dinov2.lvd142m", {"depth": 24, "layer_scale": 1e-5}),
    ],
)
def test_names_of_timm_are_models(name, fields):
    model = models.build(name)
    assert {key: getattr(model, key) for key in fields} == fields
    assert models.find(name) == name


def test_a_name_that_timm_has_not_is_refused():
    with pytest.raises(UserError, match="vit_base_patch16_225"):
        models.build("vit_base_patch16_225")


def test_a_file_beside_its_config_is_read_with_it():
    weights = loading.read_weights(TINY / "vit_base_patch16_clip_quickgelu_224/model.safetensors")
    fields = weights.fields
    assert (fields["activation"], fields["norm_epsilon"], fields["num_heads"]) == (
        *("quick_gelu", 1e-5, 2),
    )


def copied(kind, folder):
    """Returns a copy of a state dict without its config."""
    file = folder / "model.safetensors"
    file.write_bytes((TINY / kind / "model.safetensors").read_bytes())
    return file


def test_what_a_file_alone_cannot_tell_is_said(tmp_path):
    weights = loading.read_weights(copied("vit_base_patch16_224", tmp_path))
    assert weights.fields["activation"] == "gelu"
    assert "assumed are exact GELU" in weights.notes[0]


def test_a_table_of_positions_does_not_rule_out_rotary_ones(tmp_path):
    file = copied("eva02_base_patch14_224", tmp_path)
    with pytest.raises(UserError, match="position cannot be told"):
        infer_model(loading.read_weights(file), num_heads=2)
    named = infer_model(loading.read_weights(file), "eva02_base_patch14_224", num_heads=2)
    assert (named.backbone.position, named.backbone.position_table) == ("rope", True)


def test_a_norm_is_never_offered_as_something_to_leave_out(tmp_path):
    file = copied("vit_base_patch16_clip_224", tmp_path)
    arguments = json.loads((TINY / "vit_base_patch16_224/config.json").read_text())["model_args"]
    model = models.build(
        *("vit",), patch_size=4, width=16, depth=2, num_heads=arguments["num_heads"], mlp_dim=24
    )
    with pytest.raises(UserError, match="pre_norm") as caught:
        checkpoints.load(file, model)
    assert "ignore=" not in str(caught.value)


def test_a_file_written_here_tells_its_gelu(tmp_path):
    weights = loading.read_weights(TINY / "vit_base_patch16_224")
    model = infer_model(weights, activation="quick_gelu", norm_epsilon=1e-5)
    params, _ = loading.fit(weights, model, "")
    file = tmp_path / "c.safetensors"
    checkpoints.save(params, model, file, "timm")
    written = loading.read_weights(file)
    assert (written.fields["activation"], written.fields["norm_epsilon"]) == ("quick_gelu", 1e-5)
    assert not written.notes


def test_a_header_that_tells_no_fields_is_refused(tmp_path):
    state = array_files.read_arrays(TINY / "vit_base_patch16_224/model.safetensors")
    files.write_safetensors(tmp_path / "c.safetensors", state, vit_jax="gelu")
    with pytest.raises(UserError, match="its header tells no fields"):
        loading.read_weights(tmp_path / "c.safetensors")


def test_perception_encoder_without_its_config_tells_no_positions(tmp_path):
    file = copied("vit_pe_core_base_patch16_224", tmp_path)
    with pytest.raises(UserError, match="position cannot be told"):
        infer_model(loading.read_weights(file), num_heads=2)


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ({"act_layer": "gelu_tanh"}, {"activation": "gelu_tanh"}),
        (
            {"act_layer": "swish", "norm_layer": "rmsnorm"},
            {"activation": "silu", "norm": "rmsnorm"},
        ),
        ({"norm_layer": "LayerNorm(1e-05)"}, {"norm": "layernorm", "norm_epsilon": 1e-5}),
        ({"norm_layer": "layernorm"}, {"norm": "layernorm", "norm_epsilon": 1e-6}),
    ],
)
def test_timms_words_for_layers_are_known(words, fields):
    found = timm_names.find("vit_base_patch16_224", words).fields
    assert {key: found[key] for key in fields} == fields


@pytest.mark.parametrize(
    ("kind", "how", "keeps_aspect"),
    [
        ("vit_base_patch16_224", "bicubic", False),
        ("naflexvit_base_patch16_parfac_gap", "torch_bilinear", True),
        ("naflexvit_base_patch16_radio_v3", "corners", True),
        ("naflexvit_giant_patch16_radio_v3", "torch_bilinear", True),
    ],
)
def test_positions_are_resized_as_timms_model_resizes_them(kind, how, keeps_aspect):
    weights = loading.read_weights(TINY / kind)
    assert (weights.interpolation, weights.keeps_aspect) == (how, keeps_aspect)


def test_an_argument_that_nobody_reads_is_refused():
    idle = {"img_size": 64, "drop_path_rate": 0.1, "attn_gated": None}
    assert timm_names.find("vit_base_patch16_rope_224", idle)
    with pytest.raises(UserError, match="attn_gated=True"):
        timm_names.find("vit_base_patch16_rope_224", {"attn_gated": True})


@pytest.mark.parametrize("layer", ["relu", "batchnorm"])
def test_timms_other_layers_are_refused(layer):
    key = "act_layer" if layer == "relu" else "norm_layer"
    with pytest.raises(UserError, match=layer):
        timm_names.find("vit_base_patch16_224", {key: layer})


def test_the_printed_call_names_a_model_of_the_same_size():
    arrays = {
        "backbone/patch_embed/kernel": np.zeros((16, 16, 3, 192)),
        "backbone/blocks_0/mlp/dense1/kernel": np.zeros((192, 768)),
    }
    model = models.build("vit_ti16")
    args = timm.arguments(arrays, model, (224, 224), class_row=True)
    text = timm.call("x.safetensors", model, args)
    assert text.startswith('model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=')
