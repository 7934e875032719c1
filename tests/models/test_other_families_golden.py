"""Mixers and hybrids against numbers recorded from google-research/vision_transformer."""

import golden_trees
import jax
import numpy as np
import pytest
from golden_trees import GOLDEN

from vit_jax import models

pytestmark = pytest.mark.usefixtures("all_optimizations")

HYBRIDS = sorted(path.stem for path in (GOLDEN / "vision_transformer").glob("hybrid_*.json"))
MIXERS = sorted(path.stem for path in (GOLDEN / "vision_transformer").glob("mixer_*.json"))


def assert_logits(model, params, config, io):
    if config["num_classes"]:
        params = {"backbone": params, "head": golden_trees.head(config["flat"])}
    out = jax.jit(model.apply)({"params": params}, io["images"])
    actual = out if config["num_classes"] else out.pooled
    expected = io["logits"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-6)


def build_hybrid(config, num_classes):
    return models.build(
        "r50_b16",
        num_classes=num_classes,
        patch_size=config["patches"]["size"],
        width=config["hidden_size"],
        depth=config["transformer"]["num_layers"],
        num_heads=config["transformer"]["num_heads"],
        mlp_dim=config["transformer"]["mlp_dim"],
        stages=config["resnet"]["num_layers"],
        width_factor=config["resnet"]["width_factor"],
        scan=False,
    )


@pytest.mark.parametrize("case", HYBRIDS)
def test_hybrid_outputs(case):
    stored, flat, io = golden_trees.load("vision_transformer", case, ".")
    model = build_hybrid(stored["config"], stored["num_classes"])
    params = golden_trees.vit(flat) | {"stem": golden_trees.resnet_stem(flat)}
    assert_logits(model, params, stored | {"flat": flat}, io)


def test_hybrid_with_resnet_stages():
    """A checkpoint that the reference brought to another size and another head."""
    stored, flat, io = golden_trees.load("vision_transformer", "load_hybrid_up", ".")
    positions = "Transformer/posembed_input/pos_embedding"
    flat[positions] = io[f"result/{positions}"]
    flat |= {f"head/{name}": io[f"init/head/{name}"] for name in ("kernel", "bias")}
    model = build_hybrid(stored["target_config"], stored["target_classes"])
    params = golden_trees.vit(flat) | {"stem": golden_trees.resnet_stem(flat)}
    assert {"stage1", "stage2"} <= params["stem"].keys()
    assert_logits(model, params, {"num_classes": stored["target_classes"], "flat": flat}, io)


@pytest.mark.parametrize("case", MIXERS)
def test_mixer_outputs(case):
    stored, flat, io = golden_trees.load("vision_transformer", case, ".")
    config = stored["config"]
    model = models.build(
        "mixer_b16",
        num_classes=stored["num_classes"],
        patch_size=config["patches"]["size"],
        width=config["hidden_dim"],
        depth=config["num_blocks"],
        tokens_mlp_dim=config["tokens_mlp_dim"],
        channels_mlp_dim=config["channels_mlp_dim"],
    )
    params = models.stack_blocks(golden_trees.mixer(flat))
    assert_logits(model, params, stored | {"flat": flat}, io)


def test_text_transformer_outputs():
    stored, flat, io = golden_trees.load("vision_transformer", "lit_texttransformer", ".")
    config = stored["config"]["text"]
    model = models.build(
        "text",
        num_classes=stored["config"]["out_dim"][1],
        width=config["width"],
        depth=config["num_layers"],
        num_heads=config["num_heads"],
        mlp_dim=config["mlp_dim"],
        vocab_size=config["vocab_size"],
        scan=False,
    )
    backbone = golden_trees.encoder(flat, "txt/Encoder_0") | {
        "token_embed": flat["txt/Embed_0/embedding"],
        "pos_embed": flat["txt/pos_embedding"],
    }
    params = {"backbone": backbone, "head": golden_trees.subtree(flat, "txt/head")}
    logits = jax.jit(model.apply)({"params": params}, io["tokens"])
    expected = io["out/txt/logits"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-6)
