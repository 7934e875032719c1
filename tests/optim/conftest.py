"""Shared by the optimizer's tests: stored reference runs, and a small parameter tree."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled

from vit_jax import optim
from vit_jax.config.durations import Duration

# What several test modules share.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def golden() -> Callable[..., tuple[dict, dict[str, np.ndarray]]]:
    """`golden("big_vision", "optim_adam_f32mu")` gives a case's JSON and its arrays.

    `parts` are the endings of the array files, merged into one dict.
    """

    def load(source: str, case: str, *parts: str) -> tuple[dict, dict[str, np.ndarray]]:
        folder = GOLDEN / source
        facts = json.loads((folder / f"{case}.json").read_text())
        arrays = {}
        for part in parts or ("",):
            arrays |= sampled.load(folder / f"{case}{part}.npz")
        return facts, arrays

    return load


@pytest.fixture
def nest() -> Callable[..., dict]:
    """The nested dict under a prefix of flat arrays: `nest(arrays, "init/")`. Samples stay."""

    def under(arrays: Mapping[str, np.ndarray], prefix: str = "") -> dict:
        flat = {
            name.removeprefix(prefix): (
                array if isinstance(array, sampled.Sample) else jnp.asarray(array)
            )
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
        return flax.traverse_util.unflatten_dict(flat, sep="/")

    return under


@pytest.fixture
def make() -> Callable[..., optim.Optimizer]:
    """`make(params, total=20, **keys of config.optim)`: 100 examples in batches of 10."""

    def build(params: Any, total: int = 20, **keys: Any) -> optim.Optimizer:
        duration = Duration(total=total, batch_size=10, num_examples=100)
        return optim.build({"schedule": {"name": "constant"}, **keys}, params, duration=duration)

    return build


@pytest.fixture
def params() -> dict:
    """A toy ViT's tree with every kind of parameter: stacked, head-split, table, bias, scale."""
    shapes = {
        "backbone/patch_embed/kernel": (2, 2, 3, 8),
        "backbone/patch_embed/bias": (8,),
        "backbone/pos_embed": (1, 4, 8),
        "backbone/cls": (1, 1, 8),
        "backbone/blocks/norm1/scale": (3, 8),
        "backbone/blocks/attn/query/kernel": (3, 8, 2, 4),
        "backbone/blocks/attn/query/bias": (3, 2, 4),
        "backbone/blocks/attn/out/kernel": (3, 2, 4, 8),
        "backbone/blocks/mlp/dense1/kernel": (3, 8, 16),
        "backbone/norm/scale": (8,),
        "head/kernel": (8, 5),
        "head/bias": (5,),
    }
    draw = np.random.default_rng(0).standard_normal
    flat = {name: jnp.asarray(draw(shape), jnp.float32) for name, shape in shapes.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture
def unstack() -> Callable[[dict], dict]:
    """The same parameters as `params`, one subtree a block."""

    def split(tree: dict) -> dict:
        backbone = dict(tree["backbone"])
        stacked = backbone.pop("blocks")
        depth = len(jax.tree.leaves(stacked)[0])
        for i in range(depth):
            backbone[f"blocks_{i}"] = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], stacked)
        return {**tree, "backbone": backbone}

    return split
