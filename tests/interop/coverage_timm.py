"""Measures how many of timm's pretrained Vision Transformers compute the same in this package.

    python tests/interop/coverage_timm.py [--only=REGEX] [--table=FILE.md]

Names that differ in sizes alone make one kind. One model of each kind is built by timm's own
factory, narrow and with two blocks, with random weights and statistics of which none is zero, and
saved as timm saves models. The folder is then read without another word. "Equal" is 1e-5 of the
largest output, float32, with products at full precision. Networks of fifty convolutions round more
than that in float32; they are compared in float64, and the table says so. A name that
`models.build` refuses is not counted. Needs the extras `interop` and `test`.
"""

import argparse
import collections
import json
import pathlib
import re
import tempfile

import jax
import numpy as np
import torch
from random_weights import draw
from real_packages import import_packages

from vit_jax import models
from vit_jax.checkpoints import loading
from vit_jax.checkpoints.fit.inference import infer_model
from vit_jax.errors import UserError
from vit_jax.models import timm_names

timm, _ = import_packages()

TOLERANCE = 1e-5
SIZES = frozenset(
    (
        *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_blocks"),
        *("layers", "width_factor", "rel_pos_dim", "pos_embed_grid_size", "window_size"),
        *("attn_pool_mlp_ratio", "attn_pool_num_heads", "global_attn_indexes", "swiglu_align_to"),
        *("rope_rescale_coords", "qkv_fused"),
    )
)
"""Arguments that change how large a model is, and not what it computes."""

FLAGS = frozenset(("init_values", "reg_tokens", "num_reg_tokens", "ref_feat_shape", "num_kv_heads"))
"""Arguments of which any value computes alike."""

DOUBLE = ("ResNetV2",)
"""Classes that are compared in float64."""


def kinds():
    """Returns {kind: architectures}, the kind as JSON of a class and the arguments that matter."""
    found = collections.defaultdict(list)
    for name, row in timm_names.table().items():
        args = {k: bool(v) if k in FLAGS else v for k, v in row["args"].items() if k not in SIZES}
        if "embed_layer" in args and isinstance(args["embed_layer"], dict):
            stem = args["embed_layer"].get("backbone", {})
            args["embed_layer"] = [args["embed_layer"]["name"], stem.get("name")]
        found[json.dumps([row["class"], args], sort_keys=True)].append(name)
    return found


def tiny(name, row):
    """Returns a small model of an architecture and the side of its images."""
    patch = row["args"].get("patch_size", 16)
    side = 4 * (patch if isinstance(patch, int) else patch[0])
    if "embed_layer" in row["args"] and row["class"] == "VisionTransformer":
        side = 128 if patch == 1 else side * 16  # Patches of a stem's map.
    narrow = {"embed_dim": 64, "num_heads": 4, "depth": 2}
    if row["class"] == "MlpMixer":
        narrow = {"embed_dim": 64, "num_blocks": 2}
    if row["class"] == "ResNetV2":
        side, narrow = 64, {}
    if row["class"] == "NaFlexVit":
        side = 8 * patch  # Its positions are of a grid of their own.
    kv = row["args"].get("num_kv_heads")
    if kv:
        uneven = isinstance(kv, list) and len(set(kv)) > 1
        narrow["num_kv_heads"] = [4, 2] if uneven else 4
    classes = 10 if any(number for _, number, _ in row["tags"].values()) else 0
    sized = {**narrow, "img_size": side}
    for extra in (sized, narrow, {"depth": 2, "img_size": side}, {"img_size": side}):
        try:
            return timm.create_model(name, num_classes=classes, **extra), side
        except (TypeError, AssertionError, RuntimeError):
            continue
    raise RuntimeError(f"{name} cannot be made small")


def error_of(name, row, folder):
    """Returns the largest difference of one kind's outputs, relative to the largest output."""
    model, side = tiny(name, row)
    draw(model)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    double = row["class"] in DOUBLE
    expected = (model.double()(images.double()) if double else model(images)).numpy()
    weights = loading.read_weights(folder)
    # A model takes this dtype in JAX's 64-bit mode alone.
    jax.config.update("jax_enable_x64", double)
    ours = infer_model(weights, **({"dtype": "float64"} if double else {}))
    params, report = loading.fit(weights, ours, folder, image_size=side)
    if report.initialised:
        raise UserError(f"initialized: {report.initialised[0]}")
    inputs = images.permute(0, 2, 3, 1).numpy().astype(np.float64 if double else np.float32)
    actual = np.asarray(jax.jit(apply, static_argnums=0)(ours, params, inputs))
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def apply(model, params, images):
    """Returns logits, or the pooled vector of a backbone."""
    out = model.apply({"params": params}, images)
    return getattr(out, "pooled", out)


def builds(name):
    """Returns whether the full model of a name can be built here."""
    try:
        return models.build(name) is not None
    except UserError:
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="regular expression of the kinds to try")
    parser.add_argument("--table", type=pathlib.Path, help="the file for the table")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    table, lines, good, total = timm_names.table(), [], 0, 0
    for names in sorted(kinds().values(), key=lambda names: (-tags_of(names), names)):
        label = next((name for name in names if "_base_" in name), names[0])
        if not re.search(args.only, label):
            continue
        count, total = tags_of(filter(builds, names)), total + tags_of(names)
        kind = table[label]["class"]
        with tempfile.TemporaryDirectory() as folder:
            try:
                error = error_of(label, table[label], folder)
                result = f"{error:.0e}" + (" in float64" if kind in DOUBLE else "")
                good += count if error <= TOLERANCE else 0
            except UserError as refusal:
                result = f"refused: {str(refusal).replace(folder, label):.90}"
        lines.append(f"| {count} of {tags_of(names)} | `{label}` | {kind} | {result} |")
        print(lines[-1], flush=True)
        jax.clear_caches()
    print(f"{good} of {total} names, timm {timm.__version__}, torch {torch.__version__}")
    if args.table:
        head = ["| names | for example | class | largest difference |", "|---|---|---|---|"]
        args.table.write_text("\n".join([*head, *lines, ""]))


def tags_of(names):
    """Returns the number of pretrained names of some architectures."""
    return sum(len(timm_names.table()[name]["tags"]) for name in names)


if __name__ == "__main__":
    with torch.no_grad():
        main()
