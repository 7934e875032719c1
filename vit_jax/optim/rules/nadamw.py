"""NAdamW: AdamW with Nesterov's momentum, the strongest baseline of the AlgoPerf benchmark."""

import optax

from vit_jax.optim.rules.adamw import adamw


def nadamw(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: str = "float32"
) -> optax.GradientTransformation:
    """Returns `adamw` with Nesterov momentum (Dozat, 2016; Dahl et al., 2023, arXiv:2306.07179)."""
    return adamw(b1, b2, eps, mu_dtype, nesterov=True)
