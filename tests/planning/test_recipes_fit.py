"""Recipes fit the TPU slices that their docstrings name, by ahead-of-time compiles."""

import importlib.util

import jax
import pytest

from vit_jax.config import load
from vit_jax.planning.plan import make_plan
from vit_jax.planning.target import Target

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"
    ),
]


@pytest.mark.parametrize(
    ("recipe", "hardware"),
    [
        ("vit_s16_i1k", "v3-8"),
        ("vit_i1k", "v3-128"),
        ("mixer_b16_i1k", "v3-128"),
        ("bit_r50_i1k", "v3-128"),
        ("r26_s32", "v3-32"),
        ("algoperf_vit", "v5e-16"),
        ("deit3:s16", "v5e-16"),
        ("deit3:b16", "v5e-32"),
        ("deit3:l16", "v5e-128"),
        ("strong_i1k:s16", "v5e-32"),
        ("strong_i1k:b16", "v5e-64"),
        ("augreg:vit_b16,checkpoint=none", "v5e-64"),
        ("augreg:vit_l16,checkpoint=none", "v5e-128"),
        ("finetune", "v5e-64"),
        ("linear_probe:model=vit_b16,checkpoint=none", "v5e-4"),
        ("segment_ade20k:checkpoint=none", "v5e-8"),
        ("detect_coco:checkpoint=none", "v5e-8"),
        ("lit_coco:checkpoint=none", "v5e-8"),
        ("vit_i21k:vit_b16", "v3-128"),
        ("vit_i21k:vit_l16", "v3-512"),
    ],
)
def test_fits_the_hardware_it_states(recipe, hardware, request):
    name, _, argument = recipe.partition(":")
    file = request.config.rootpath / f"configs/{name}.py"
    assert hardware in file.read_text()
    config = load(f"{file}:{argument}")
    # As users compile it: the exact products of the other tests take more memory.
    with jax.default_matmul_precision(config.precision):
        plan, _ = make_plan(config, Target.find(hardware))
    assert plan.fits, f"{plan.used_bytes / 2**30:.2f} GiB of {plan.hbm_bytes / 2**30:.0f}"
