"""Tests share what is traced between equal runs alone."""

from types import SimpleNamespace

import equal_runs
import jax
import numpy as np
import pytest

from vit_jax.config.durations import durations
from vit_jax.types import ArraySpec, DataInfo

INFO = DataInfo({"image": ArraySpec((8, 8, 1), np.float32)}, 10)
HEAD = "head/kernel"
CONSTANT = {"name": "constant"}


def key_of(config):
    """The key of a run that is not built."""
    return equal_runs._key(
        SimpleNamespace(
            config=config,
            mesh=None,
            duration=durations(config, num_examples=1000),
            task=SimpleNamespace(info=INFO),
        )
    )


@pytest.mark.parametrize(
    ("keys", "is_shared"),
    [
        ({}, True),
        ({"optim__freeze_until": [[HEAD, 5]]}, True),
        ({"optim__decay_schedule__name": "constant"}, True),
        ({"optim__group_schedules": [[HEAD, {**CONSTANT, "warmup": 3}]]}, True),
        ({"optim__freeze_until": [[HEAD, "50%"]]}, False),
        ({"optim__freeze_until": [[HEAD, " .5 epochs"]]}, False),
        ({"optim__decay_schedule__name": "cosine"}, False),
        ({"optim__decay_schedule__end": 10.0}, False),
        ({"optim__group_schedules": [[HEAD, {**CONSTANT, "warmup": "50%"}]]}, False),
        ({"optim__group_schedules": [[HEAD, {**CONSTANT, "cooldown": 3}]]}, False),
        ({"optim__group_schedules": [[HEAD, {}]]}, False),
        ({"optim__schedule__cooldown": 3}, False),
        ({"optim__schedule__warmup": "10%"}, False),
        ({"optim__schedule__name": "cosine"}, False),
    ],
)
def test_runs_of_two_lengths_share_only_what_depends_on_none(tiny_config, keys, is_shared):
    short, long = (key_of(tiny_config(total=total, **keys)) for total in (10, 100))
    assert (short == long) is is_shared
    assert short == key_of(tiny_config(total=10, **keys))


@pytest.mark.parametrize(
    "keys", [{"optim__lr": 0.5}, {"seed": 5}, {"model__depth": 1}, {"ema_decay": 0.5}]
)
def test_runs_of_other_programs_share_nothing(tiny_config, keys):
    assert key_of(tiny_config()) != key_of(tiny_config(**keys))


@pytest.mark.parametrize(
    "context",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.default_matmul_precision("bfloat16"),
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.numpy_rank_promotion("allow"),
        jax.disable_jit,
        lambda: jax.debug_nans(True),
    ],
)
def test_nothing_is_shared_with_other_settings_of_jax(context):
    def shared():
        return equal_runs._remember("test", "key", object, ())

    found = shared()
    assert shared() is found
    with context():
        assert shared() is not found
    assert shared() is found
