"""Recipes fit the TPU slices that their docstrings name, by ahead-of-time compiles."""

import importlib.util

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
    ],
)
def test_fits_the_hardware_it_states(recipe, hardware, request):
    file = request.config.rootpath / f"configs/{recipe}.py"
    assert hardware in file.read_text()
    plan, _ = make_plan(load(str(file)), Target.find(hardware))
    assert plan.fits, f"{plan.used_bytes / 2**30:.2f} GiB of {plan.hbm_bytes / 2**30:.0f}"
