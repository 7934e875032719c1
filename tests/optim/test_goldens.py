"""Five updates of every reference optimizer, number by number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sampled

# Their bfloat16 rounding is that of optimized programs.
pytestmark = pytest.mark.usefixtures("all_optimizations")

ADAM = {"mu": "1/0/1/", "nu": "1/0/2/"}

# config.optim of each recorded case, and where the recording keeps the parts of the state.
CASES = {
    "optim_adam_f32mu": (
        {
            "name": "adamw",
            "args": {"b2": 0.95},
            "lr": 0.02,
            "weight_decay": 0.03,
            "clip_norm": 0.4,
            "schedule": {"name": "cosine", "warmup": 2, "cooldown": 3},
        },
        {"adamw/mu": ADAM["mu"], "adamw/nu": ADAM["nu"]},
    ),
    "optim_adam_bf16mu_clip_wd": (
        {
            "name": "adamw",
            "args": {"mu_dtype": "bfloat16"},
            "lr": 0.01,
            "weight_decay": 0.02,
            "clip_norm": 1.0,
            "schedule": {"name": "cosine", "warmup": 3},
        },
        {"adamw/mu": ADAM["mu"], "adamw/nu": ADAM["nu"]},
    ),
    "optim_adafactor_clip_wd": (
        {
            "name": "adafactor",
            "lr": 0.01,
            "weight_decay": 0.02,
            "clip_norm": 1.0,
            "schedule": {"name": "rsqrt", "warmup": 2, "cooldown": 4, "timescale": 5},
        },
        {
            "adafactor/second_moment/v_row": "1/0/0/1/",
            "adafactor/second_moment/v_col": "1/0/0/2/",
            "adafactor/second_moment/v": "1/0/0/3/",
            "adafactor/mu": "1/0/2/1/",
        },
    ),
    "optim_momentum_lrmult_frozen": (
        {
            "name": "sgd",
            "args": {"momentum_dtype": "bfloat16"},
            "lr": 0.1,
            "weight_decay": 0.01,
            "clip_norm": 0.5,
            "decay_mask": "head/.*|.*/kernel",
            "decay_mults": [["head/.*", 2.0]],
            "lr_mults": [["head/.*", 10.0]],
            "freeze": ["embedding/.*"],
            "schedule": {"name": "cosine", "warmup": 2},
        },
        {"sgd/mu": "1/0/0/"},
    ),
}


def _update(optimizer):
    """(updates, new parameters, new state) from gradients, state, parameters and step."""

    @jax.jit
    def update(grads, state, params, step):
        updates, state = optimizer.update(grads, state, params, step)
        return updates, optax.apply_updates(params, updates), state

    return update


@pytest.mark.parametrize("case", CASES)
def test_equals_big_vision(golden, nest, make, case):
    keys, state_parts = CASES[case]
    facts, arrays = golden("big_vision", case)
    params = nest(arrays, "init/")
    optimizer = make(params, facts["config"]["total_steps"], decay_coupling="schedule", **keys)
    state, update = jax.jit(optimizer.init)(params), _update(optimizer)
    for step in range(facts["num_steps"]):
        _, params, state = update(nest(arrays, f"grad{step}/"), state, params, step)
        expected = nest(arrays, f"after{step}/")
        jax.tree.map(
            lambda ours, theirs: sampled.assert_close(ours, theirs, atol=1e-5),
            params,
            expected,
        )
    for ours, theirs in state_parts.items():
        part = state
        for name in ours.split("/"):
            part = part[name] if isinstance(part, dict) else getattr(part, name)
        jax.tree.map(_assert_state_equal, part, nest(arrays, f"state_final/{theirs}"))


def _assert_state_equal(ours: jax.Array, theirs: np.ndarray | sampled.Sample) -> None:
    one_bfloat16_step = 2.0**-7
    rtol = one_bfloat16_step if ours.dtype == jnp.bfloat16 else 1e-5
    sampled.assert_close(np.asarray(ours, np.float32), theirs, rtol=rtol, atol=1e-7)


def test_equals_vision_transformer(golden, nest, make):
    facts, arrays = golden("vision_transformer", "optimizer_sgd_momentum_bf16", ".io")
    params = nest(arrays, "param/0/")
    optimizer = make(
        params,
        facts["schedule"]["total_steps"],
        name="sgd",
        args={"momentum": facts["momentum"], "momentum_dtype": "bfloat16"},
        lr=facts["schedule"]["base_lr"],
        clip_norm=facts["clip_global_norm"],
        schedule={"name": "cosine", "warmup": facts["schedule"]["warmup_steps"]},
    )
    state, update = jax.jit(optimizer.init)(params), _update(optimizer)

    def assert_close(ours, theirs):
        ours = np.asarray(ours, np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())

    for step in range(facts["steps"]):
        grads = nest(arrays, f"grad/{step}/")
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
        np.testing.assert_allclose(norm, arrays["grad_global_norm"][step], rtol=1e-6)
        np.testing.assert_allclose(optimizer.lr(step), arrays["lr"][step], rtol=0, atol=3e-8)
        updates, params, state = update(grads, state, params, step)
        jax.tree.map(assert_close, updates, nest(arrays, f"update/{step}/"))
        jax.tree.map(assert_close, params, nest(arrays, f"param/{step + 1}/"))
        jax.tree.map(assert_close, state["sgd"].mu, nest(arrays, f"momentum/{step + 1}/"))
