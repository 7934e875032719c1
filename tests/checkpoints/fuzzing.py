"""Damaged checkpoints: seeds of every format, and mutations that a number decides."""

import functools
import json
import shutil
import struct
import warnings

import numpy as np
from golden_cases import GOLDEN
from models_to_save import build
from mutations import BYTES, changed_json, rewritten_member, time_limit

from vit_jax import checkpoints
from vit_jax.checkpoints import input_spec, loading
from vit_jax.checkpoints.fit.inference import infer_model
from vit_jax.errors import UserError

# Formats whose files hold a checksum of each array.
CHECKED = ("npz", "pth", "orbax")


def write_seeds(folder):
    """Writes a small checkpoint of every format; returns name → path."""
    model, params, _ = build("token")
    paths = {
        "npz": folder / "c.npz",
        "safetensors": folder / "c.safetensors",
        "hf": folder / "hf",
        "orbax": folder / "orbax",
    }
    for name, path in paths.items():
        to = {"safetensors": "timm"}.get(name, name)
        checkpoints.save(params, model, path, to)
    paths["pth"] = shutil.copy(GOLDEN / "interop" / "torch_views.pth", folder / "c.pth")
    paths["old_pth"] = shutil.copy(GOLDEN / "interop" / "torch_old.bin", folder / "c.bin")
    paths["timm_folder"] = folder / "timm"
    paths["timm_folder"].mkdir()
    shutil.copy(paths["safetensors"], folder / "timm" / "model.safetensors")
    (folder / "timm" / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    told = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": [224, 224],
            "do_resize": True, "resample": 3, "rescale_factor": 0.004}  # fmt: skip
    (paths["hf"] / "preprocessor_config.json").write_text(json.dumps(told))
    paths["open_clip"] = folder / "open_clip"
    recorded = GOLDEN / "hf_tiny" / "open_clip"
    shutil.copytree(recorded, paths["open_clip"], ignore=lambda *_: ["io.npz", "texts.npz"])
    return paths


def mutate(path, target, number):
    """Copies a seed to `target`, and damages one of its files in a way that `number` decides."""
    rng = np.random.default_rng(number)
    if path.is_dir():
        shutil.copytree(path, target)
        files = sorted(x for x in target.rglob("*") if x.is_file() and x.stat().st_size)
        file = files[rng.integers(len(files))]
    else:
        file = target
        shutil.copy(path, file)
    data = file.read_bytes()
    ways = [*BYTES]
    if data[:2] == b"PK":
        ways += [rewritten_member] * 3
    elif data[8:9] == b"{":
        ways += [changed_header] * 3
    elif data[:1] == b"{":
        ways += [changed_json] * 3
    way = ways[rng.integers(len(ways))]
    file.write_bytes(way(data, rng))
    return way.__name__


def changed_header(data, rng):
    (length,) = struct.unpack("<Q", data[:8])
    header = changed_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def outcome(path):
    """Returns the arrays of a checkpoint, or None where a `UserError` of one line refuses it."""
    with time_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            weights = loading.read_weights(path)
            arrays = dict(weights.arrays)
            infer_model(weights, num_heads=2)
            input_spec.read(path)
        except UserError as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error
            return None
    return arrays


@functools.cache
def expected_arrays(path):
    return loading.read_weights(path).arrays


def check(kind, path, target, number):
    """Raises an AssertionError if a damaged checkpoint loads as something else in silence."""
    way = mutate(path, target, number)
    try:
        arrays = outcome(target)
    finally:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    # A rewritten member has a right checksum of wrong bytes: nobody can notice.
    if arrays is not None and kind in CHECKED and way != "rewritten_member":
        expected = expected_arrays(path)
        for name in arrays.keys() & expected.keys():
            np.testing.assert_array_equal(arrays[name], expected[name], err_msg=f"{way} {name}")
