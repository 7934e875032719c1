"""Schedules of self-supervised methods equal those of their published code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import self_supervised_golden as golden

from vit_jax.optim import method_schedules as curves


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


def assert_follows(curve, base, expected, start, total, **keys):
    found = base * curve(jnp.arange(len(expected)), start, total, **keys)
    golden.assert_near(found, expected, golden.SCHEDULE)


def test_dino():
    arrays = golden.arrays("dino_schedules")
    for name, about in golden.settings("dino_schedules").items():
        if name == "teacher_temp_key":
            continue
        base, iters = about["base"], about["iters_per_epoch"]
        start, total = (about[key] * iters for key in ("warmup_epochs", "epochs"))
        keys = {"end": about["final"] / base, "first": about["start_warmup_value"] / base}
        assert_follows(curves.dino, base, arrays[f"sched/{name}"], start, total, **keys)


def test_the_temperature_of_dino_rises_by_epoch():
    for name, expected in golden.arrays("dino_schedules").items():
        if "teacher_temp" in name:
            first, last, warmup, _ = map(float, name.removeprefix("sched/teacher_temp_").split("_"))
            keys = {"first": first / last, "end": 1.0}
            assert_follows(curves.dino, last, expected, int(warmup), int(warmup), **keys)


@pytest.mark.parametrize("case", ["a", "b"])
def test_dinov2(case):
    about = golden.settings("dinov2_schedules")[case]
    length, base = about["L"], about["lr"]
    start, total, frozen = (about[key] * length for key in ("warm", "epochs", "fr"))
    arrays = golden.below(golden.arrays("dinov2_schedules"), f"sched/{case}/")
    follows = functools.partial(assert_follows, curves.dino)
    end = about["mn"] / base
    follows(base, arrays["lr"], start, total, end=end)
    follows(base, arrays["last_layer_lr"], start, total, end=end, zero_until=frozen)
    follows(about["wd"], arrays["wd"], 0, total, end=about["wde"] / about["wd"])
    follows(about["m"], arrays["momentum"], 0, total, end=about["mf"] / about["m"])
    warm, top = about["wte"] * length, about["tt"]
    follows(top, arrays["teacher_temp"], warm, warm, end=1.0, first=about["wt"] / top)


def test_ijepa():
    arrays, settings = golden.arrays("ijepa_schedules"), golden.settings("ijepa_schedules")
    for case in ("a", "b"):
        about = settings[case]
        rate, decay, none = arrays[f"sched/{case}"].T
        total, base = about["T_max"], about["ref_lr"]
        keys = {"end": about["final_lr"] / base, "first": about["start_lr"] / base}
        assert_follows(curves.ijepa, base, rate, about["warmup_steps"], total, **keys)
        end = about["final_wd"] / about["ref_wd"]
        assert_follows(curves.ijepa, about["ref_wd"], decay, 0, total, end=end)
        assert not none.any()


def test_simmim():
    arrays, about = golden.arrays("simmim_schedules"), golden.settings("simmim_schedules")
    base, iters = about["base_lr"], about["iters_per_epoch"]
    start, total = about["warmup_epochs"] * iters, about["epochs"] * iters
    first = about["warmup_lr"] / base
    cosine = arrays["sched/long_cosine"]
    assert_follows(
        curves.simmim, base, cosine, start, total, first=first, end=about["min_lr"] / base
    )
    boundaries = np.multiply(about["multisteps"], iters)
    factors = [about["gamma"] ** (i + 1) for i in range(len(boundaries))]
    keys = {"boundaries": boundaries, "factors": factors, "first": first}
    assert_follows(curves.simmim_stair, base, arrays["sched/long_multistep"], start, total, **keys)
