"""Schedules against both references, and their edges."""

import jax
import numpy as np
import pytest

from vit_jax.config.durations import Duration
from vit_jax.errors import UserError
from vit_jax.optim import schedules
from vit_jax.optim.spec import DEFAULTS

BIG_VISION = {
    "cosine_warm10": {"name": "cosine", "warmup": 10},
    "cosine_nowarm_base": {"name": "cosine"},
    "linear_warm5_end": {"name": "linear", "warmup": 5, "end": 0.01},
    "rsqrt_warm10_cool12": {"name": "rsqrt", "warmup": 10, "cooldown": 12, "timescale": 8},
    "cosine_warm_percent_cool": {"name": "cosine", "warmup": "10 percent", "cooldown": 6},
    "stair": {"name": "stair", "warmup": 4, "boundaries": [20, 40], "factors": [0.1, 0.01]},
    "cosine_warm_epochs_scaled": {"name": "cosine", "warmup": "0.7 epochs"},
}


def make(spec, total=60):
    duration = Duration(total=total, batch_size=128, num_examples=1280)
    spec = {**DEFAULTS["schedule"], **spec}
    return schedules.build(spec, total_steps=total, duration=duration)


@pytest.mark.parametrize("case", BIG_VISION)
def test_equals_big_vision(golden, case):
    facts, arrays = golden("big_vision", "schedules")
    (recorded,) = (entry for entry in facts["cases"] if entry["name"] == case)
    base = recorded["kwargs"].get("base", 1.0)
    if recorded["kwargs"].get("scale_with_batchsize"):
        base *= recorded["batch_size"] / 256
    schedule = jax.jit(jax.vmap(make(BIG_VISION[case])))
    ours = base * schedule(np.arange(61, dtype=np.int32))
    np.testing.assert_allclose(ours, arrays[case], rtol=0, atol=1e-6)


@pytest.mark.parametrize("index", range(6))
def test_equals_vision_transformer(golden, index):
    facts, arrays = golden("vision_transformer", "lr_schedules", ".io")
    entry = facts["entries"][index]
    base, name = entry["base_lr"], entry["decay_type"]
    end = {"end": entry["linear_end"] / base} if name == "linear" else {}
    spec = {"name": name, "warmup": entry["warmup_steps"], **end}
    schedule = make(spec, entry["total_steps"])
    steps = arrays[f"{entry['name']}/step"]
    traced = base * jax.jit(jax.vmap(schedule))(steps.astype(np.int32))
    concrete = [base * float(schedule(int(step))) for step in steps]
    tolerance = {"rtol": 0, "atol": 1e-6 * base}
    np.testing.assert_allclose(traced, arrays[f"{entry['name']}/lr_traced"], **tolerance)
    np.testing.assert_allclose(concrete, arrays[f"{entry['name']}/lr"], **tolerance)


def test_constant_with_cooldown_is_a_trapezoid():
    schedule = make({"name": "constant", "warmup": 4, "cooldown": 4}, total=12)
    values = [float(schedule(step)) for step in range(14)]
    ramp = [0, 0.25, 0.5, 0.75]
    assert values == [*ramp, 1, 1, 1, 1, 1, *ramp[:0:-1], 0, 0]


def test_polynomial_decays_by_a_power_to_its_end():
    """Segmenter's: (lr - min_lr)·(1 - step / total)^0.9 + min_lr, without a warm-up."""
    schedule = make({"name": "polynomial", "power": 0.9, "end": 0.01}, total=10)
    expected = [0.99 * (1 - step / 10) ** 0.9 + 0.01 for step in range(11)]
    np.testing.assert_allclose([schedule(step) for step in range(11)], expected, rtol=1e-6)
    assert float(make({"name": "polynomial", "warmup": 4}, 12)(8)) == pytest.approx(0.5)


def test_a_shifted_rsqrt_starts_further_along_its_curve():
    """big_vision's: the warm-up ends at 1 / sqrt(1 + shift / timescale)."""
    spec = {"name": "rsqrt", "timescale": 8, "warmup": 4}
    plain, shifted = make(spec), make({**spec, "shift": 10})
    np.testing.assert_allclose(
        [shifted(step) for step in (4, 9, 30)], [plain(step) for step in (14, 19, 40)], rtol=1e-6
    )
    assert float(shifted(2)) == pytest.approx(0.5 / (1 + 10 / 8) ** 0.5)


def test_neighbouring_steps_differ_in_the_billions():
    total = 2**31 - 1
    schedule = make({"name": "constant", "cooldown": 1000, "warmup": 2**30}, total)
    late = [float(schedule(total - left)) for left in (3, 2, 1)]
    assert np.diff(late).max() < 0, "float32 steps would be equal this far out"
    assert float(schedule(total)) == 0.0


def test_result_is_a_float32_scalar():
    for name in ("cosine", "linear", "rsqrt", "constant"):
        value = make({"name": name, "warmup": 2})(1)
        assert (value.dtype, value.shape) == (np.float32, ())


def triangle(step, start, total, *, end=0.5, height=1.0):
    """Falls from `height` along a line, as a schedule of someone else's."""
    del start
    return height * (1.0 - (1.0 - end) * step / total)


def test_schedule_named_by_its_import_path(monkeypatch):
    import sys
    import types

    module = types.ModuleType("their_package")
    module.triangle = triangle
    monkeypatch.setitem(sys.modules, "their_package", module)
    spec = {"name": "their_package:triangle", "end": 0.2}
    assert float(make(spec, 10)(5)) == pytest.approx(0.6)
    assert float(make({**spec, "args": {"height": 3.0}}, 10)(5)) == pytest.approx(1.8)
    with pytest.raises(UserError, match=r"schedule\.args\.hight is no further key .*'height'"):
        make({**spec, "args": {"hight": 3.0}}, 10)
    with pytest.raises(UserError, match=r"schedule\.args\.end is no further key"):
        make({**spec, "args": {"end": 3.0}}, 10)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "cosin"}, "did you mean 'cosine'"),
        ({"name": "cosine", "timescale": 5}, "schedule.timescale is no key of the cosine schedule"),
        ({"name": "cosine", "warmup": 61}, "schedule.warmup: 61 is 61 steps"),
        ({"name": "stair"}, "as many factors as boundaries"),
        ({"name": "stair", "boundaries": [9, 3], "factors": [1, 2]}, "must ascend"),
        ({"name": "simmim_stair", "boundaries": [9, 3], "factors": [1, 2]}, "must ascend"),
        ({"name": "rsqrt", "timescale": 0}, "timescale=0"),
        ({"name": "polynomial", "power": -1.0}, "power=-1"),
        ({"name": "ijepa", "stretch": 0.5}, "stretch=0.5: write 1 or more"),
        ({"name": "no.such:thing"}, "package.module:function"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        make(spec)
