"""Schedule-Free AdamW (Defazio et al., 2024): averaging instead of a decaying learning rate."""

from typing import Any

import jax
import optax
import optax.contrib

from vit_jax.optim.rule import Rule
from vit_jax.types import Params


def schedule_free_adamw(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_lr_power: float = 2.0,
) -> Rule:
    """Returns Schedule-Free AdamW, with three sequences of parameters x, y, and z.

    Gradients are computed at y = (1 - b1)·z + b1·x. AdamW without momentum updates z, and x is an
    average of z. The trained parameters are y; `Optimizer.evaluation_params` returns x, which is
    the one to evaluate.

    Use the constant schedule with a warm-up, because the averaging replaces the decay.

    weight_lr_power: the weight of z in the average is the largest learning rate so far to this
        power, so the warm-up has a small weight.
    """
    direction = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)

    def around(step: optax.GradientTransformation, lr: jax.Array) -> optax.GradientTransformation:
        return optax.contrib.schedule_free(step, lr, b1, weight_lr_power)

    def evaluation_params(state: Any, params: Params) -> Params:
        return optax.contrib.schedule_free_eval_params(state, params)

    return Rule(direction, around=around, evaluation_params=evaluation_params)
