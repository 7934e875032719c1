"""NAdamW: AdamW with Nesterov's momentum, the strongest baseline of the AlgoPerf benchmark."""

import jax
import jax.numpy as jnp
import optax

from vit_jax.optim.rules.adamw import adamw


def nadamw(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: str = "float32",
    shared_correction: bool = False,
) -> optax.GradientTransformation:
    """Returns `adamw` with Nesterov momentum (Dozat, 2016; Dahl et al., 2023, arXiv:2306.07179).

    At step t, the look-ahead is b1 · m / (1 - b1^(t+1)) + (1 - b1) · g / (1 - b1^t).

    shared_correction: divides both terms by 1 - b1^t, as AlgoPerf's baseline does (Choi et al.,
        2019, arXiv:1910.05446, table 1). Early steps are larger, the first one by a factor of
        (1 + b1)² / (1 + 2 · b1), which is 1.29 for b1 = 0.9.
    """
    if not shared_correction:
        return adamw(b1, b2, eps, mu_dtype, nesterov=True)
    adam = adamw(b1, b2, eps, mu_dtype)

    def update(
        grads: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        behind, state = adam.update(grads, state, params)
        gradient = optax.tree.bias_correction(grads, b1, state.count)
        scale = optax.tree.bias_correction(state.nu, b2, state.count)
        ahead = jax.tree.map(
            lambda d, g, v: b1 * d + (1 - b1) * g / (jnp.sqrt(v) + eps), behind, gradient, scale
        )
        return ahead, state

    return optax.GradientTransformation(adam.init, update)
