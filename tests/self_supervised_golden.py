"""Arrays that the reference code of self-supervised methods computed, and how to compare with them.

tests/golden/self_supervised/README.md says where they come from.
"""

import json
from pathlib import Path

import numpy as np
import sampled

FOLDER = Path(__file__).parent / "golden" / "self_supervised"

FORWARD, TRAINED, SCHEDULE = 1e-5, 5e-5, 1e-9
"""Tolerances of outputs and losses, of gradients and trained parameters, and of schedules."""


def arrays(case):
    """The arrays of a case; a `sampled.Sample` in the place of parameters that are compared."""
    return sampled.load(FOLDER / f"{case}.npz")


def settings(case):
    return json.loads((FOLDER / f"{case}.json").read_text())


def below(found, prefix):
    """The arrays whose name begins with `prefix`, by the rest of the name."""
    return {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}


def assert_near(actual, expected, tolerance=FORWARD, name=""):
    """Asserts that no element differs by more than `tolerance` times the largest element."""
    assert np.shape(actual) == np.shape(expected), name
    largest = np.abs(expected).max(initial=0.0)
    error = np.abs(np.asarray(actual, np.float64) - expected).max(initial=0.0)
    assert error <= tolerance * largest, f"{name}: {error} of {largest}"


def prototype_head(flat):
    """The parameters of a reference's head as `PrototypeHead` has them."""
    layers = ["mlp"] if "mlp.weight" in flat else ["mlp.0", "mlp.2", "mlp.4"]
    tree = {
        f"dense{i}": {"kernel": flat[f"{layer}.weight"].T, "bias": flat[f"{layer}.bias"]}
        for i, layer in enumerate(layers, start=1)
        if f"{layer}.weight" in flat
    }
    last = {"kernel": flat["last_layer.weight_v"].T}
    if "last_layer.weight_g" in flat:
        last["scale"] = flat["last_layer.weight_g"][:, 0]
    return {**tree, "prototypes": last}


def vit(flat, num_heads):
    """The parameters of a reference's ViT, in PyTorch's names, as `VisionTransformer` has them."""
    tree = {}
    if "patch_embed.proj.weight" in flat:
        patch = flat["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
        tree["patch_embed"] = {"kernel": patch, "bias": flat["patch_embed.proj.bias"]}
    for ours, theirs in (("cls", "cls_token"), ("registers", "register_tokens")):
        if theirs in flat:
            tree[ours] = flat[theirs]
    if "pos_embed" in flat:
        tree["pos_embed"] = flat["pos_embed"]
    if "norm.weight" in flat:
        tree["norm"] = _norm(flat, "norm")
    blocks = []
    while inner := below(flat, f"blocks.{len(blocks)}."):
        blocks.append(block(inner, num_heads))
    return {**tree, "blocks": _stacked(blocks)}


def masked_autoencoder(flat, num_heads, decoder_heads):
    """The parameters of MAE as `MaskedAutoencoder` has them."""
    blocks = []
    while inner := below(flat, f"decoder_blocks.{len(blocks)}."):
        blocks.append(block(inner, decoder_heads))
    decoder = {
        "embed": _dense(flat, "decoder_embed"),
        "mask_token": flat["mask_token"],
        "blocks": _stacked(blocks),
        "norm": _norm(flat, "decoder_norm"),
        "predict": _dense(flat, "decoder_pred"),
    }
    if "decoder_pos_embed" in flat:
        decoder["pos_embed"] = flat["decoder_pos_embed"]
    return {"backbone": vit(flat, num_heads), "decoder": decoder}


def block(flat, num_heads):
    tree = {"norm1": _norm(flat, "norm1"), "norm2": _norm(flat, "norm2")}
    dim = flat["norm1.weight"].size
    heads = (num_heads, dim // num_heads)
    qkv = flat["attn.qkv.weight"].reshape(3, *heads, dim).transpose(0, 3, 1, 2)
    attention = {
        name: {"kernel": x} for name, x in zip(("query", "key", "value"), qkv, strict=True)
    }
    biases = flat.get("attn.qkv.bias")
    for i, name in enumerate(attention):
        if biases is not None:
            attention[name]["bias"] = biases.reshape(3, *heads)[i]
        short = f"attn.{name[0]}_bias"
        if short in flat:
            attention[name]["bias"] = flat[short].reshape(heads)
    out = {"kernel": flat["attn.proj.weight"].T.reshape(*heads, dim)}
    if "attn.proj.bias" in flat:
        out["bias"] = flat["attn.proj.bias"]
    tree["attn"] = {**attention, "out": out}
    for i in (1, 2):
        for name in (f"ls{i}.gamma", f"gamma_{i}"):
            if name in flat:
                tree[f"scale{i}"] = flat[name]
    return {**tree, "mlp": _mlp(flat)}


def _mlp(flat):
    if "mlp.w12.weight" in flat:
        gate, up = (_dense(flat, "mlp.w12", half) for half in (0, 1))
        return {"gate": gate, "dense1": up, "dense2": _dense(flat, "mlp.w3")}
    return {"dense1": _dense(flat, "mlp.fc1"), "dense2": _dense(flat, "mlp.fc2")}


def _dense(flat, name, half=None):
    tree = {"kernel": flat[f"{name}.weight"].T}
    if f"{name}.bias" in flat:
        tree["bias"] = flat[f"{name}.bias"]
    if half is None:
        return tree
    return {key: np.split(x, 2, axis=-1)[half] for key, x in tree.items()}


def _norm(flat, name):
    return {"scale": flat[f"{name}.weight"], "bias": flat[f"{name}.bias"]}


def _stacked(trees):
    first = trees[0]
    if isinstance(first, dict):
        return {key: _stacked([tree[key] for tree in trees]) for key in first}
    return np.stack(trees)


def images(nchw):
    """Images of a reference as our models take them."""
    return np.moveaxis(nchw, -3, -1)


def assert_params(actual, expected, tolerance=TRAINED):
    """Asserts that parameters or their gradients are near, all but the biases of keys.

    expected: by name in our tree, samples of the large ones.
    """
    actual = dict(named(actual))
    assert expected.keys() <= actual.keys()
    for name, value in expected.items():
        if name.endswith("key/bias"):
            continue
        if isinstance(value, sampled.Sample):
            found = np.asarray(actual[name])
            assert_near(sampled.norm(found), value.norm, tolerance, name)
            assert_near(sampled.pick(found), value.values, tolerance, name)
        else:
            assert_near(actual[name], value, tolerance, name)


def named(tree, path=()):
    """Yields (name, array) of a tree of parameters."""
    if hasattr(tree, "items"):
        for key, value in tree.items():
            yield from named(value, (*path, key))
    else:
        yield "/".join(path), tree
