"""Recipes that pre-train without labels: published sizes, and two steps when shrunk."""

import numpy as np
import pytest

from vit_jax import data
from vit_jax.config import load
from vit_jax.errors import UserError
from vit_jax.training.loop import train
from vit_jax.training.run import Run

# Backbones at 224 pixels: the published count without a classifier, with class token and its
# position. Heads: three layers, and 65,536 directions of 256 numbers with their lengths.
S, B, L = 21_665_664, 85_798_656, 303_301_632


def head(width):
    return (width + 1) * 2048 + 2049 * 2048 + 2049 * 256 + 257 * 65_536


RECIPES = {
    "dino_s16_i1k": S + head(384),
    "dino_s16_i1k:b16": B + head(768),
    # LayerScale, and the token of masked patches.
    "dinov2_l14_i1k:size=l16": L + 48 * 1024 + 1024 + head(1024),
    # 60 more patches have positions, of 180 pixels less.
    "dinov2_l14_i1k": L + 48 * 1024 + 1024 + head(1024) + (60 - 180) * 1024,
    # Rotary positions have no parameters; patches have a head of their own.
    "dinov3_l16_i1k": L - 197 * 1024 + 48 * 1024 + 1024 + 2 * head(1024),
    "ijepa_h14_i1k": 652_713_984,  # A backbone of 631 million, and a predictor of 22.
    # No positions but one table, no bias of keys; LayerScale, the mask token, the linear layer.
    "simmim_b16_i1k": B - 197 * 768 - 12 * 768 + 732 * 12 + 24 * 768 + 768 + 769 * 768,
}


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


def loaded(root, recipe, *arguments):
    name, _, given = recipe.partition(":")
    config = load(f"{root}/configs/{name}.py:{','.join(filter(None, (given, *arguments)))}")
    config.compilation_cache = ""
    return config


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_published_size_and_its_schedules_fit_the_run(recipe, root):
    config = loaded(root, recipe)
    source = data.expect(config.data.to_dict())
    run = Run.build(config, source=source)
    assert run.num_params() == RECIPES[recipe]
    small = loaded(root, recipe, "runlocal")
    Run.build(small, source=data.expect(small.data.to_dict()))
    if "dino" in recipe:
        crops = 10 if recipe.endswith("b16") else 8
        side = {"dinov2_l14_i1k": 98}.get(recipe, 96)
        assert run.task.info.spec["global"].shape == (2, 224, 224, 3)
        assert run.task.info.spec["local"].shape == (crops, side, side, 3)


def test_anchored_crops_are_twice_as_large_as_the_student_sees_them(root):
    config = loaded(root, "dinov3_l16_i1k", "gram", "checkpoint=runs/dinov3")
    config.init.checkpoint = ""
    run = Run.build(config, source=data.expect(config.data.to_dict()))
    assert run.task.info.spec["global"].shape == (2, 448, 448, 3)
    assert run.task.image_spec.shape == (224, 224, 3)
    assert run.task.gram_period == 10_000
    with pytest.raises(UserError, match="gram and checkpoint go together"):
        loaded(root, "dinov3_l16_i1k", "gram")


def test_learning_rates_are_those_of_the_published_batches(root):
    rates = {
        "dino_s16_i1k": 5e-4 * 1024 / 256,
        "dino_s16_i1k:b16": 7.5e-4 * 1024 / 256,
        "dinov2_l14_i1k": 4e-3 * 2**0.5,
        "dinov3_l16_i1k": 1e-3 * 4 * 2**0.5,
        "ijepa_h14_i1k": 1e-3,
        "simmim_b16_i1k": 4e-4,
    }
    for recipe, rate in rates.items():
        assert loaded(root, recipe).optim.lr == pytest.approx(rate)
    for recipe in ("dino_s16_i1k:b17", "dinov2_l14_i1k:l15"):
        with pytest.raises(UserError, match="did you mean"):
            loaded(root, recipe)


@pytest.mark.soak
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if ":" not in recipe])
def test_shrunk_it_takes_two_steps(recipe, root, tmp_path):
    config = loaded(root, recipe, "runlocal")
    config.log.pictures = False
    outcome = train(config, str(tmp_path))
    assert np.isfinite(list(outcome.results.values())).all()
