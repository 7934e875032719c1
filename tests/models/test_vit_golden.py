"""The ViT against numbers recorded from google-research/vision_transformer and big_vision."""

import functools
import json

import golden_trees
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled
from golden_trees import GOLDEN

from vit_jax import models

pytestmark = pytest.mark.usefixtures("all_optimizations")

VISION_TRANSFORMER = sorted(
    path.stem for path in (GOLDEN / "vision_transformer").glob("vit_*.json")
)
BIG_VISION = sorted(path.name[: -len("_io.npz")] for path in GOLDEN.glob("big_vision/vit_*_io.npz"))
BIG_VISION_POOLING = {"gap": "mean", "tok": "token", "map": "map", "0": "none"}
# What these have, others have, too, or a test of test_vit.py says the same.
CONTAINED = (
    "vit_token_nohead_p8", "vit_unpooled_p8", "vit_token_cropped_p8", "vit_tok_learn_rep24",
)  # fmt: skip


def soaked(cases):
    return [pytest.param(x, marks=pytest.mark.soak) if x in CONTAINED else x for x in cases]


def assert_forward_close(actual, expected):
    """The tolerance that the vision_transformer recordings state."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-6)


def build_vision_transformer(config, **overrides):
    fields = {
        "patch_size": config["patches"]["size"],
        "width": config["hidden_size"],
        "pooling": {"token": "token", "gap": "mean"}.get(config["classifier"], "none"),
        "class_token": config["classifier"].startswith("token"),
        "representation_size": config.get("representation_size"),
        "scan": False,
    }
    encoder = config["transformer"]
    if encoder is None:
        fields |= {"depth": 0, "num_heads": 1, "position": "none"}
    else:
        fields |= {
            "depth": encoder["num_layers"],
            "num_heads": encoder["num_heads"],
            "mlp_dim": encoder["mlp_dim"],
        }
    return models.build("vit", **{k: v for k, v in (fields | overrides).items() if v is not None})


@pytest.mark.parametrize("case", soaked(VISION_TRANSFORMER))
def test_vision_transformer_outputs(case):
    config, flat, io = golden_trees.load("vision_transformer", case, ".")
    model = build_vision_transformer(config["config"], num_classes=config["num_classes"])
    params = golden_trees.vit(flat)
    if config["num_classes"]:
        params = {"backbone": params, "head": golden_trees.head(flat)}
        apply = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
        out, seen = apply({"params": params}, io["images"])
    else:
        out = jax.jit(model.apply)({"params": params}, io["images"]).pooled
        seen = {}
    expected = io["logits"]
    if config["config"]["classifier"] == "token_unpooled":
        expected = expected[:, 1:]
    assert_forward_close(out.reshape(expected.shape), expected)
    for name in io:
        if name.startswith("attn/"):
            layer = name.replace("attn/encoderblock_", "blocks_")
            weights = seen["intermediates"]["backbone"][layer]["attn"]["attention"][0]
            assert_forward_close(weights, io[name])


def build_big_vision(config, num_classes):
    model = dict(config)
    fields = {"patch_size": [16, 16], "width": 768, "depth": 12, "num_heads": 12}
    name = f"vit_{model.pop('variant').replace('/', '')}" if "variant" in model else "vit"
    if name != "vit":
        fields = {}
    renamed = {"patch_size", "width", "depth", "num_heads", "mlp_dim", "scan"}
    fields |= {key: value for key, value in model.items() if key in renamed}
    rep = model.get("rep_size")
    if rep:
        fields["representation_size"] = fields["width"] if rep is True else rep
    return models.build(
        name,
        num_classes=num_classes,
        pooling=BIG_VISION_POOLING[model.get("pool_type", "gap")],
        position={"learn": "learned"}.get(model.get("posemb", "learn"), model.get("posemb")),
        class_token_position=False,
        **({"scan": False} | fields),
    )


def first_token(logits):
    """big_vision's pool_type="0" takes the first patch; ours then scores every patch."""
    return logits[:, 0, 0] if logits.ndim == 4 else logits


@pytest.mark.parametrize("case", soaked(BIG_VISION))
def test_big_vision_outputs_and_gradients(case):
    config, flat, io = golden_trees.load("big_vision", case, "_")
    model = build_big_vision(config["model"], config["num_classes"])
    params = {"backbone": golden_trees.vit(flat), "head": golden_trees.head(flat)}

    def loss(params):
        logits = first_token(model.apply({"params": params}, io["image"]))
        labels = io["labels"][:, None]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels, axis=-1)
        return -jnp.mean(picked), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, io["logits"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(value, io["loss_softmax_xent"], rtol=1e-4)
    grads = jax.tree.map(np.asarray, grads)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, io["grad_norm_softmax_xent"], rtol=1e-4)
    stored = GOLDEN / "big_vision" / f"{case}_grads.npz"
    if stored.exists():
        flat_grads = sampled.load(stored)
        expected = {"backbone": golden_trees.vit(flat_grads), "head": golden_trees.head(flat_grads)}
        jax.tree.map_with_path(assert_gradient_close, grads, expected)


def assert_gradient_close(path, actual, expected):
    if "key" in jax.tree_util.keystr(path) and "bias" in jax.tree_util.keystr(path):
        # Softmax does not see a constant added to all keys: the recorded values are noise.
        assert np.abs(actual).max() < 1e-6
    else:
        sampled.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def count_vit(row, patch=None, **fields):
    name = f"vit_{row['variant'].replace('-', '')}{patch or row['patch']}"
    return models.param_count(models.build(name, num_classes=1000, **fields), row["res"])


VARIANT_ROWS = json.loads((GOLDEN / "big_vision" / "vit_variants.json").read_text())["rows"]


@pytest.mark.parametrize(
    "row", VARIANT_ROWS, ids=lambda row: f"{row['variant']}-{row['pool_type']}"
)
def test_big_vision_parameter_counts(row):
    fields = {
        "pooling": BIG_VISION_POOLING[row["pool_type"]],
        "position": {"learn": "learned"}.get(row["posemb"], row["posemb"]),
        "class_token_position": False,
    }
    if row["rep_size"]:
        fields["representation_size"] = row["width"]
    assert count_vit(row, **fields) == row["num_params"]
