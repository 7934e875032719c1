"""Arrays that the reference code of self-supervised methods computed, and how to compare with them.

tests/golden/self_supervised/README.md says where they come from.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden" / "self_supervised"
FORWARD, TRAINED, SCHEDULE = 1e-5, 5e-5, 1e-9
"""Tolerances of outputs and losses, of gradients and trained parameters, and of schedules."""


def arrays(case):
    with np.load(FOLDER / f"{case}.npz", allow_pickle=False) as file:
        return dict(file)


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
