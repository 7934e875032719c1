"""The initial values of each recipe's model have the deviations that the source's have."""

import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from vit_jax import models
from vit_jax.config import load
from vit_jax.errors import UserError

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/initialization.json").read_text())["recipes"]


@pytest.fixture
def quick_draws(monkeypatch):
    """Lets NumPy draw, because compiling each shape takes longer than everything else here."""
    rng = np.random.default_rng(0)

    def truncated(key, lower, upper, shape, dtype=None, **_):
        return np.float32(ndtri(rng.uniform(ndtr(lower), ndtr(upper), shape)))

    def uniform(key, shape=(), dtype=None, minval=0.0, maxval=1.0, **_):
        return np.float32(rng.uniform(minval, maxval, shape))

    def normal(key, shape=(), dtype=None, **_):
        return np.float32(rng.standard_normal(shape))

    for module in (jax.random, jax.nn.initializers.normal.__globals__["random"]):
        monkeypatch.setattr(module, "truncated_normal", truncated)
        monkeypatch.setattr(module, "uniform", uniform)
        monkeypatch.setattr(module, "normal", normal)


def initial_values(model, size, monkeypatch):
    """The initial value of each parameter by name, without computing the model's output."""
    inits, original = {}, nn.Module.param

    def param(module, name, init, *args, **kwargs):
        inits["/".join((*module.path, name))] = lambda: init(jax.random.key(0), *args, **kwargs)
        return original(module, name, init, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "param", param)
    jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, size, size, 3), np.float32))
    return {name: np.asarray(nn.unbox(draw())) for name, draw in inits.items()}


@pytest.mark.usefixtures("quick_draws")
@pytest.mark.parametrize("recipe", GOLDEN)
def test_initial_values_have_the_deviations_of_the_source(recipe, monkeypatch):
    name, _, arguments = recipe.partition(":")
    config = load(f"{ROOT}/configs/{name}.py:{arguments}")
    fields = dict(config.model) | {"num_classes": 1000}
    if "stages" in models.field_names(fields["name"]):
        fields["stages"] = (1,)
    if "depth" in models.field_names(fields["name"]):
        fields |= {"depth": 1, "scan": False}
    found = initial_values(models.build(**fields), 224, monkeypatch)
    found = {name.replace("blocks_0", "blocks"): value for name, value in found.items()}
    expected = GOLDEN[recipe]["deviations"]
    for pattern in expected:
        assert any(re.fullmatch(pattern, name) for name in found), pattern
    for name, value in found.items():
        deviation = next((v for p, v in expected.items() if re.fullmatch(p, name)), 0.0)
        tolerance = 5 / np.sqrt(2 * value.size) * deviation
        if not name.endswith("/frequencies"):  # Rotary frequencies are directions, not noise.
            assert np.float64(value).std() == pytest.approx(deviation, abs=tolerance + 1e-9), name


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="initialization='diet' is not known; did you mean 'deit'"):
        models.build("vit_s16", initialization="diet")
