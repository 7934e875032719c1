"""State dicts of timm and transformers, against outputs of those packages (tests/interop)."""

import json
import shutil

import golden_cases
import jax
import numpy as np
import pytest
from golden_cases import assert_close

from vit_jax import checkpoints, models
from vit_jax.checkpoints import array_files, files, loading
from vit_jax.checkpoints.fit import surgery
from vit_jax.checkpoints.formats import _jax_names, _torch_layout
from vit_jax.checkpoints.weights import Renames
from vit_jax.errors import UserError

INTEROP = golden_cases.GOLDEN / "interop"
TIMM = sorted(path.stem for path in INTEROP.glob("timm_*.safetensors"))
CONV = "vit.embeddings.patch_embeddings.projection.weight"


def load_case(name):
    config = json.loads((INTEROP / f"{name}.json").read_text())["fields"]
    model = models.build("mixer_b16" if "tokens_mlp_dim" in config else "vit", **config)
    return model, dict(np.load(INTEROP / f"{name}.io.npz"))


def logits_of(model, params, images):
    out = jax.jit(model.apply)({"params": params}, images)
    return getattr(out, "pooled", out)


@pytest.mark.parametrize("case", TIMM)
def test_timm_logits_and_names(case, tmp_path):
    """Outputs equal those of timm, and the file that is written back equals that of timm."""
    model, io = load_case(case)
    path = INTEROP / f"{case}.safetensors"
    params, report = checkpoints.load_with_report(path, model)
    assert_close(logits_of(model, params, io["images"]), io["logits"])
    assert not report.initialised
    assert not report.resized
    assert any("gelu_tanh" in note for note in report.notes)
    size = io["images"].shape[1:3]
    checkpoints.save(params, model, tmp_path / "c.safetensors", "timm", image_size=size)
    assert_same_arrays(tmp_path / "c.safetensors", path)


def assert_same_arrays(path, other):
    actual, expected = array_files.read_arrays(path), array_files.read_arrays(other)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def test_there_is_a_case_of_every_kind():
    assert len(TIMM) >= 7


def test_transformers_classifier(tmp_path):
    model, io = load_case("hf_classifier")
    path = INTEROP / "hf_classifier"
    params, report = checkpoints.load_with_report(path, model)
    assert_close(logits_of(model, params, io["images"]), io["logits"])
    assert not report.notes
    checkpoints.save(params, model, tmp_path / "out", "hf", image_size=(8, 12))
    assert_same_arrays(tmp_path / "out/model.safetensors", path / "model.safetensors")
    ours, theirs = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", path))
    about_training = ("transformers_version", "dtype", "torch_dtype", "initializer_range",
                      "encoder_stride", "pooler_act", "pooler_output_size", "id2label",
                      "attention_probs_dropout_prob", "hidden_dropout_prob")  # fmt: skip
    for config in (ours, theirs):
        for key in about_training:
            config.pop(key, None)
    assert ours == theirs


def test_transformers_shards_and_pooler():
    """The pooler is the representation layer, which a backbone has no use for."""
    model, io = load_case("hf_pooler")
    params, report = checkpoints.load_with_report(INTEROP / "hf_pooler", model)
    assert_close(logits_of(model, params, io["images"]), io["logits"])
    assert sorted(line.split(":")[0] for line in report.ignored) == [
        "head/pre_logits/bias",
        "head/pre_logits/kernel",
    ]


def test_an_array_in_two_shards_is_that_of_the_listed_one(tmp_path):
    expected = loading.read_weights(INTEROP / "hf_pooler").arrays
    folder = shutil.copytree(INTEROP / "hf_pooler", tmp_path / "hf")
    last = max(folder.glob("*.safetensors"))
    state = array_files.read_arrays(last)
    other = {"embeddings.cls_token": np.full((1, 1, 16), 9, np.float32)}
    files.write_safetensors(last, state | other)
    np.testing.assert_array_equal(
        loading.read_weights(folder).arrays["backbone/cls"], expected["backbone/cls"]
    )
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"]["embeddings.cls_token"]
    index.write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"embeddings.cls_token: two arrays .* different values"):
        loading.read_weights(folder)


def _of_torch(norm, other):
    names = Renames([("norm", "backbone/blocks_0/norm2"), ("fc", "backbone/blocks_0/norm2")])
    return _torch_layout.from_state({"norm.weight": norm, "fc.weight": other}, names)[0]


def _of_jax(norm, other):
    block = "Transformer/encoderblock_0"
    names = {f"{block}/LayerNorm_2/scale": norm, f"{block}/LayerNorm_1/scale": other}
    return _jax_names._read_tower(names, text=False).arrays


@pytest.mark.parametrize("read", [_of_torch, _of_jax])
def test_arrays_that_share_a_name_must_be_equal(read):
    norm, name = np.arange(3.0), "backbone/blocks_0/norm2/scale"
    np.testing.assert_array_equal(read(norm, norm.copy())[name], norm)
    with pytest.raises(UserError, match=rf"two arrays of the checkpoint stand for {name}"):
        read(norm, norm + 1)


def test_transformers_weights_without_their_config(tmp_path):
    model, io = load_case("hf_classifier")
    path = shutil.copy(INTEROP / "hf_classifier" / "model.safetensors", tmp_path)
    params, report = checkpoints.load_with_report(path, model)
    assert_close(logits_of(model, params, io["images"]), io["logits"])
    assert "without its config.json" in report.notes[0]


@pytest.fixture
def hf_copy(tmp_path):
    """A directory of transformers whose config can be changed: `hf_copy(key=value)` → its path."""

    def make(**keys):
        shutil.copytree(INTEROP / "hf_classifier", tmp_path / "hf")
        config = json.loads((tmp_path / "hf/config.json").read_text())
        (tmp_path / "hf/config.json").write_text(json.dumps(config | keys))
        return tmp_path / "hf"

    return make


def test_transformers_heads_must_agree(hf_copy):
    model, _ = load_case("hf_classifier")
    with pytest.raises(UserError, match=r"attn/.* is \[16, 4, 4\] and should be \[16, 2, 8\]"):
        checkpoints.load(hf_copy(num_attention_heads=4), model)


def test_transformers_notes_what_differs(hf_copy):
    model, _ = load_case("hf_classifier")
    path = hf_copy(hidden_act="gelu", layer_norm_eps=1e-12)
    _, report = checkpoints.load_with_report(path, model)
    assert report.notes == (
        "its own model has activation='gelu', norm_epsilon=1e-12; yours has"
        " activation='gelu_tanh', norm_epsilon=1e-06",
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model_type": "swin"}, "is no model that is read"),
        ({"num_attention_heads": 5}, "does not fit"),
        ({"num_attention_heads": None}, "num_attention_heads=None is no whole number"),
        ({"hidden_act": "gelu_pytorch_tan"}, "did you mean 'gelu_pytorch_tanh'"),
        ({"layer_norm_eps": 2}, "layer_norm_eps=2 is no number between 0 and 1"),
        ({"image_size": 0, "patch_size": 0}, "image_size=0 is no whole number"),
    ],
)
def test_transformers_configs_of_something_else(hf_copy, keys, words):
    model, _ = load_case("hf_classifier")
    with pytest.raises(UserError, match=words):
        checkpoints.load(hf_copy(**keys), model)


def test_transformers_positions_know_their_grid(hf_copy):
    """2x3 patches resized to 3x2: as many, but not the same."""
    model, _ = load_case("hf_classifier")
    params, report = checkpoints.load_with_report(hf_copy(), model, image_size=(12, 8))
    assert report.resized == ("backbone/pos_embed: 2x3 to 3x2, torch_bicubic",)
    table = array_files.read_arrays(INTEROP / "hf_classifier/model.safetensors")
    table = table["vit.embeddings.position_embeddings"]
    expected = surgery.resize_positions(table[:, 1:], (2, 3), (3, 2), "torch_bicubic")
    np.testing.assert_array_equal(params["backbone"]["pos_embed"][:, 1:], expected)


def test_positions_as_timm_resamples_them():
    stored = np.load(INTEROP / "timm_positions.npz")
    for name in stored.files:
        if name != "table":
            mode, _, size = name.partition("/")
            new = tuple(map(int, size.split("x")))
            resized = surgery.resize_positions(stored["table"], (4, 6), new, mode)
            np.testing.assert_allclose(resized, stored[name], atol=1e-5)


def test_norm_after_pooling_is_no_last_norm(tmp_path):
    state = array_files.read_arrays(INTEROP / "timm_mean.safetensors")
    for leaf in ("weight", "bias"):
        state[f"fc_norm.{leaf}"] = state.pop(f"norm.{leaf}")
    files.write_safetensors(tmp_path / "c.safetensors", state)
    with pytest.raises(UserError, match="holds backbone/fc_norm/bias"):
        checkpoints.load(tmp_path / "c.safetensors", load_case("timm_mean")[0])


def test_bias_of_query_norm_must_be_zero(tmp_path):
    case = "timm_registers_scale_qk_norm"
    state = array_files.read_arrays(INTEROP / f"{case}.safetensors")
    state["blocks.1.attn.q_norm.bias"] = state["blocks.1.attn.q_norm.bias"] + 1
    files.write_safetensors(tmp_path / "c.safetensors", state)
    with pytest.raises(UserError, match="query_norm/bias, which the model has no place for"):
        checkpoints.load(tmp_path / "c.safetensors", load_case(case)[0])
