"""Thirty steps of AlgoPerf's recipe at toy size equal the formulas of its published baseline.

The other side is written out here in NumPy at float64: `scale_by_nadam`, the decay and the schedule
of `jax_nadamw_full_budget.py`, `mixup_tf` of the workload's input pipeline, and smoothed labels. No
code of AlgoPerf ran. The network is a toy: a hidden layer with tanh, and a head of zeros.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import load
from vit_jax.tasks.classification import LOSSES

ROOT = Path(__file__).parents[2]
STEPS, WARMUP, BATCH, INPUTS, WIDTH, CLASSES = 30, 5, 8, 12, 6, 10


def drawn():
    """Initial parameters, and for each step inputs and soft labels after mixup and smoothing."""
    rng = np.random.default_rng(0)
    params = {
        "hidden": rng.normal(0, INPUTS**-0.5, (INPUTS, WIDTH)),
        "bias": rng.normal(0, 0.1, (1, WIDTH)),
        "head": np.zeros((WIDTH, CLASSES)),
    }
    inputs = rng.normal(size=(STEPS, BATCH, INPUTS))
    labels = np.eye(CLASSES)[(inputs @ rng.normal(size=(INPUTS, CLASSES))).argmax(-1)]
    share = rng.beta(0.2, 0.2, (STEPS, 1, 1))
    inputs = share * inputs + (1 - share) * np.roll(inputs, 1, 1)
    labels = share * labels + (1 - share) * np.roll(labels, 1, 1)
    return params, inputs, labels * (1 - 0.2) + 0.2 / CLASSES


def theirs(params, inputs, labels, *, lr, b1, b2, eps, decay):
    """The loss of each step, in float64."""
    mean = {name: np.zeros_like(value) for name, value in params.items()}
    square = {name: np.zeros_like(value) for name, value in params.items()}
    losses = []
    for step, (x, y) in enumerate(zip(inputs, labels, strict=True)):
        hidden = np.tanh(x @ params["hidden"] + params["bias"])
        logits = hidden @ params["head"]
        logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-(y * logits).sum(-1).mean())
        error = (np.exp(logits) - y) / BATCH
        below = error @ params["head"].T * (1 - hidden**2)
        grads = {
            "hidden": x.T @ below,
            "bias": below.sum(0, keepdims=True),
            "head": hidden.T @ error,
        }
        count = step + 1
        share = min(step / WARMUP, 1)
        if step > WARMUP:
            share = (1 + np.cos(np.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        for name, grad in grads.items():
            mean[name] = (1 - b1) * grad + b1 * mean[name]
            square[name] = (1 - b2) * grad**2 + b2 * square[name]
            ahead = ((1 - b1) * grad + b1 * mean[name]) / (1 - b1**count)
            direction = ahead / (np.sqrt(square[name] / (1 - b2**count)) + eps)
            params[name] = params[name] - lr * share * (direction + decay * params[name])
    return losses


def test_thirty_steps_of_algoperf(make):
    recipe = load(f"{ROOT}/configs/algoperf_vit.py").optim.to_dict()
    recipe["schedule"]["warmup"] = WARMUP
    recipe["lr"] *= 60  # So that thirty steps get somewhere.
    start, inputs, labels = drawn()
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    optimizer = make(params, STEPS, **recipe)

    @jax.jit
    def train_step(params, state, step, x, y):
        def mean_loss(params):
            hidden = jnp.tanh(x @ params["hidden"] + params["bias"])
            return LOSSES["softmax"](hidden @ params["head"], y).mean()

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state, params, step)
        return optax.apply_updates(params, updates), state, loss

    state, found = optimizer.init(params), []
    for step in range(STEPS):
        batch = np.float32(inputs[step]), np.float32(labels[step])
        params, state, loss = train_step(params, state, step, *batch)
        found.append(loss)
    args = {key: recipe["args"][key] for key in ("b1", "b2")}
    expected = theirs(
        start, inputs, labels, lr=recipe["lr"], eps=1e-8, decay=recipe["weight_decay"], **args
    )
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
