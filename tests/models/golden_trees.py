"""Parameters of the reference files in our tree, written out apart from the checkpoint code."""

import json
import pathlib

import flax.linen as nn
import jax
import numpy as np
import sampled

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def load(folder: str, case: str, separator: str):
    """(configuration, flat parameters, inputs and outputs) of a stored case."""
    base = GOLDEN / folder
    config = json.loads((base / f"{case}.json").read_text())
    params, io = (sampled.load(base / f"{case}{separator}{part}.npz") for part in ("params", "io"))
    return config, params, io


def subtree(flat, prefix):
    """The entries below `prefix`, nested."""
    nested = {}
    for key, value in flat.items():
        if key.startswith(prefix + "/"):
            *parents, leaf = key[len(prefix) + 1 :].split("/")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[leaf] = value
    return nested


def block(tree):
    """One encoder block; modules are numbered per type, or in order of use."""
    attention = next(name for name in tree if name.startswith("MultiHead"))
    mlp = next(name for name in tree if name.startswith("MlpBlock"))
    norms = sorted(name for name in tree if name.startswith("LayerNorm"))
    return {
        "norm1": tree[norms[0]],
        "attn": tree[attention],
        "norm2": tree[norms[1]],
        "mlp": {"dense1": tree[mlp]["Dense_0"], "dense2": tree[mlp]["Dense_1"]},
    }


def head(flat):
    """The classification head with its hidden layer, or nothing."""
    tree = subtree(flat, "head")
    hidden = subtree(flat, "pre_logits")
    return tree | ({"pre_logits": hidden} if hidden else {})


def encoder(flat, prefix):
    """Blocks and last norm below `prefix`; scanned blocks stay stacked."""
    tree = subtree(flat, prefix)
    out = {"norm": tree["encoder_norm"]} if "encoder_norm" in tree else {}
    for name, value in tree.items():
        if name == "encoderblock":
            out["blocks"] = block(value)
        elif name.startswith("encoderblock_"):
            out[f"blocks_{name.removeprefix('encoderblock_')}"] = block(value)
    return out


def vit(flat):
    """A ViT backbone of either reference."""
    tree = {"patch_embed": subtree(flat, "embedding")} | encoder(flat, "Transformer")
    for name in ("pos_embedding", "Transformer/posembed_input/pos_embedding"):
        if name in flat:
            tree["pos_embed"] = flat[name]
    if "cls" in flat:
        tree["cls"] = flat["cls"]
    probe = subtree(flat, "MAPHead_0")
    if probe:
        mlp = probe["MlpBlock_0"]
        tree["map_head"] = {
            "probe": probe["probe"],
            "attn": probe["MultiHeadDotProductAttention_0"],
            "norm": probe["LayerNorm_0"],
            "mlp": {"dense1": mlp["Dense_0"], "dense2": mlp["Dense_1"]},
        }
    return tree


def random_params(model, *inputs, seed=0):
    """Parameters of the right shapes without a zero among them, for anything to hide behind."""
    rng = np.random.default_rng(seed)
    abstract = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])

    def draw(path, leaf):
        is_scale = path[-1].key == "scale"
        return (is_scale + 0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, abstract)


def resnet_stem(flat):
    """Root and stages of a hybrid; the oldest files hold norms as (1, 1, 1, channels)."""
    tree = {"root": {"conv": subtree(flat, "conv_root"), "norm": subtree(flat, "gn_root")}}
    for number in range(1, 9):
        units = subtree(flat, f"block{number}")
        if units:
            tree[f"stage{number}"] = {
                unit: {name.replace("gn", "norm"): value for name, value in parts.items()}
                for unit, parts in units.items()
            }
    return jax.tree.map(lambda x: x.reshape(-1) if x.shape[:3] == (1, 1, 1) else x, tree)


def mixer(flat):
    """A Mixer backbone with numbered blocks."""
    tree = {
        "patch_embed": subtree(flat, "stem"),
        "norm": subtree(flat, "pre_head_layer_norm"),
    }
    number = 0
    while parts := subtree(flat, f"MixerBlock_{number}"):
        tree[f"blocks_{number}"] = {
            "norm1": parts["LayerNorm_0"],
            "norm2": parts["LayerNorm_1"],
        } | {
            name: {"dense1": parts[name]["Dense_0"], "dense2": parts[name]["Dense_1"]}
            for name in ("token_mixing", "channel_mixing")
        }
        number += 1
    return tree
