"""Loading the `.npz` files of vision_transformer and big_vision, against recorded outputs."""

import functools
import re

import golden_cases
import jax
import ml_dtypes
import numpy as np
import pytest
from golden_cases import assert_close, load_case

from vit_jax import checkpoints, models
from vit_jax.errors import UserError

VT, BV = "vision_transformer", "big_vision"
VITS = golden_cases.cases(VT, "vit_") + golden_cases.cases(VT, "hybrid_")
MIXERS = golden_cases.cases(VT, "mixer_")
LOADS = golden_cases.cases(VT, "load_")
BIG_VISION = golden_cases.cases(BV, "vit_")


def logits_of(model, params, images):
    out = jax.jit(model.apply)({"params": params}, images)
    return getattr(out, "pooled", out)


def test_all_cases_are_there():
    assert (len(VITS), len(MIXERS), len(LOADS), len(BIG_VISION)) >= (10, 3, 3, 5)


@pytest.mark.parametrize("case", VITS)
def test_vit_and_hybrid_logits(case):
    config, path, io = load_case(VT, case)
    model = golden_cases.vision_transformer_model(config["config"], config["num_classes"])
    params, report = checkpoints.load_with_report(path, model)
    expected = io["logits"]
    if config["config"]["classifier"] == "token_unpooled":
        expected = expected[:, 1:]
    assert_close(logits_of(model, params, io["images"]).reshape(expected.shape), expected)
    assert (report.resized, report.initialised, report.ignored, report.notes) == ((), (), (), ())


@pytest.mark.parametrize("case", MIXERS)
def test_mixer_logits(case):
    config, path, io = load_case(VT, case)
    model = golden_cases.mixer_model(config["config"], config["num_classes"])
    params = checkpoints.load(path, model)
    assert_close(logits_of(model, params, io["images"]), io["logits"])


@pytest.mark.parametrize("case", BIG_VISION)
def test_big_vision_logits(case):
    config, path, io = load_case(BV, case)
    model = golden_cases.big_vision_model(config["model"], config["num_classes"])
    params = checkpoints.load(path, model)
    logits = logits_of(model, params, io["image"])
    # big_vision's pool_type="0" takes the first patch; ours then scores every patch.
    assert_close(logits[:, 0, 0] if logits.ndim == 4 else logits, io["logits"])


@pytest.mark.parametrize("case", LOADS)
def test_loading_at_another_size_as_the_reference_does(case):
    config, path, io = load_case(VT, case)
    model = golden_cases.vision_transformer_model(
        config["target_config"], config["target_classes"], scan=False
    )
    params, report = checkpoints.load_with_report(path, model, image_size=config["target_image"])
    assert_close(
        params["backbone"]["pos_embed"], io["result/Transformer/posembed_input/pos_embedding"]
    )
    assert not np.any(params["head"]["kernel"])
    assert any("corners" in line for line in report.resized)
    assert [line.split(":")[0] for line in report.initialised] == ["head/kernel", "head/bias"]
    params["head"] |= {name: io[f"init/head/{name}"] for name in ("kernel", "bias")}
    assert_close(logits_of(model, params, io["images"]), io["logits"])


def test_scanned_text_towers_are_read_like_others(tmp_path):
    config, path, io = load_case(VT, "lit_texttransformer")
    flat = dict(np.load(path))
    block = re.compile(r"(.*Encoder_0/encoderblock)_(\d+)/(.*)")
    stacked, rest = {}, {}
    for name, array in flat.items():
        match = block.fullmatch(name)
        if match:
            stacked.setdefault(f"{match[1]}/{match[3]}", {})[int(match[2])] = array
        else:
            rest[name] = array
    assert stacked
    stacked = {n: np.stack([by[i] for i in range(len(by))]) for n, by in stacked.items()}
    np.savez(tmp_path / "scanned.npz", **rest, **stacked)
    model = text_model(config)
    params = checkpoints.load(tmp_path / "scanned.npz", model)
    assert_close(logits_of(model, params, io["tokens"]), io["out/txt/logits"])


def text_model(config):
    text = config["config"]["text"]
    return models.build(
        "text",
        num_classes=config["config"]["out_dim"][1],
        width=text["width"],
        depth=text["num_layers"],
        num_heads=text["num_heads"],
        mlp_dim=text["mlp_dim"],
        vocab_size=text["vocab_size"],
    )


def test_text_tower_logits():
    config, path, io = load_case(VT, "lit_texttransformer")
    model = text_model(config)
    params = checkpoints.load(path, model)
    assert_close(logits_of(model, params, io["tokens"]), io["out/txt/logits"])


def bert(config, **fields):
    """The text tower of the BERT case."""
    sizes = config["config"]["bert_config"]
    return models.build(
        "bert_base",
        num_classes=config["config"]["out_dim"][1],
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        mlp_dim=sizes["intermediate_dim"],
        vocab_size=sizes["vocab_size"],
        **{"max_length": sizes["max_length"], **fields},
    )


@pytest.mark.parametrize("scan", [True, False])
def test_bert_tower_logits(scan):
    config, path, io = load_case(VT, "lit_bert")
    model = bert(config, scan=scan)
    params, report = checkpoints.load_with_report(path, model)
    assert (io["tokens"] == 0).any()  # padding, which must not count
    assert_close(logits_of(model, params, io["tokens"]), io["out/txt/logits"])
    assert [line.split(":")[0] for line in report.ignored] == ["img/ (40 arrays)", "t"]
    assert not report.initialised


def test_similarity_of_an_image_text_model():
    """Both towers of one file, and its temperature: the reference's zero-shot scores."""
    config, path, io = load_case(VT, "lit_bert")
    towers = {
        "images": golden_cases.vision_transformer_model(
            config["config"]["image"], config["config"]["out_dim"][0]
        ),
        "tokens": bert(config),
    }
    vectors = {}
    for name, model in towers.items():
        z = logits_of(model, checkpoints.load(path, model), io[name])
        vectors[name] = z / np.linalg.norm(z, axis=1, keepdims=True)
    assert_close(vectors["images"], io["zimg"])
    assert_close(vectors["tokens"], io["ztxt"])
    scores = np.exp(np.load(path)["t"][0]) * (vectors["tokens"] @ vectors["images"].T)
    assert_close(scores, io["similarity"])


def test_bert_of_another_length_is_named():
    config, path, _ = load_case(VT, "lit_bert")
    with pytest.raises(UserError, match="16 positions, but the model has 512"):
        checkpoints.load(path, bert(config, max_length=512))


def test_image_tower_of_an_image_text_model():
    config, path, _ = load_case(VT, "lit_texttransformer")
    model = golden_cases.vision_transformer_model(config["config"]["image"], None)
    params, report = checkpoints.load_with_report(path, model)
    np.testing.assert_array_equal(params["cls"], np.load(path)["img/cls"])
    assert all(line.startswith(("txt/ (", "t:")) for line in report.ignored)


@pytest.fixture
def token_case():
    config, path, io = load_case(VT, "vit_token_rect_p8")
    model = golden_cases.vision_transformer_model(config["config"], config["num_classes"])
    return model, dict(np.load(path)), io


@pytest.mark.parametrize("prefix", ["opt/target/", "params/", "params/img/"])
def test_prefixes(tmp_path, token_case, prefix):
    model, flat, io = token_case
    other = {"opt/state/step": np.zeros((1,)), "chrono": np.ones(2)}
    np.savez(tmp_path / "c.npz", **{prefix + name: x for name, x in flat.items()}, **other)
    params, report = checkpoints.load_with_report(tmp_path / "c.npz", model)
    assert_close(logits_of(model, params, io["images"]), io["logits"])
    assert {line.split(":")[0] for line in report.ignored} == set(other)


def test_bfloat16_stored_as_void(tmp_path, token_case):
    model, flat, _ = token_case
    rounded = {name: x.astype(ml_dtypes.bfloat16) for name, x in flat.items()}
    np.savez(tmp_path / "c.npz", **{name: x.view("V2") for name, x in rounded.items()})
    params = checkpoints.load(tmp_path / "c.npz", model)
    assert params["backbone"]["cls"].dtype == np.float32
    np.testing.assert_array_equal(params["backbone"]["cls"], rounded["cls"].astype(np.float32))


def test_scanned_and_numbered_blocks_are_one():
    config, path, _ = load_case(BV, "vit_gap_learn_scan")
    build = functools.partial(golden_cases.big_vision_model, config["model"], config["num_classes"])
    scanned, numbered = (checkpoints.load(path, build(scan=scan)) for scan in (True, False))
    for leaf, other in zip(
        jax.tree.leaves(scanned), jax.tree.leaves(models.stack_blocks(numbered)), strict=True
    ):
        np.testing.assert_array_equal(leaf, other)
    kernel = np.load(path)["Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"]
    np.testing.assert_array_equal(scanned["backbone"]["blocks"]["mlp"]["dense1"]["kernel"], kernel)


def test_class_token_folded_into_big_vision_positions(tmp_path):
    """pos_embedding with a row for the class token, and with the class token itself in that row."""
    config, path, io = load_case(BV, "vit_tok_learn_rep24")
    model = golden_cases.big_vision_model(config["model"], config["num_classes"])
    flat = dict(np.load(path))
    row = np.full_like(flat["cls"], 0.25)
    flat["pos_embedding"] = np.concatenate([row, flat["pos_embedding"]], axis=1)
    flat["cls"] = flat["cls"] - row
    np.savez(tmp_path / "beside.npz", **flat)
    params = checkpoints.load(tmp_path / "beside.npz", model)
    assert_close(logits_of(model, params, io["image"]), io["logits"])
    flat["pos_embedding"][:, :1] += flat.pop("cls")
    np.savez(tmp_path / "within.npz", **flat)
    params, report = checkpoints.load_with_report(tmp_path / "within.npz", model)
    assert_close(logits_of(model, params, io["image"]), io["logits"])
    assert any("first row" in line for line in report.resized)


def test_mixer_says_that_it_cannot_change_size():
    config, path, _ = load_case(VT, "mixer_p8")
    model = golden_cases.mixer_model(config["config"], config["num_classes"])
    with pytest.raises(UserError, match="token_mixing"):
        checkpoints.load(path, model, image_size=64)
