"""Adam (Kingma & Ba, 2015); with the decay added outside, AdamW (Loshchilov & Hutter, 2019)."""

import jax
import jax.numpy as jnp
import optax

from vit_jax.optim.momentum import decayed


def adamw(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: str = "float32",
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Returns Adam's direction, mû / (sqrt(nû) + eps), with bias correction of both moments.

    mu_dtype: the dtype in which the first moment is stored. "bfloat16" halves its memory without a
        known loss of accuracy (Zhai et al., 2022, section 3.4). The direction uses the new moment
        before it is rounded, and the old moment is multiplied by b1 rounded to this dtype, as in
        the published runs of the big_vision recipes.
    nesterov: uses Nesterov's momentum (Dozat, 2016); the rule is then called NAdamW.
    """
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nesterov=nesterov)
    if jnp.dtype(mu_dtype) == jnp.float32:
        return adam

    def update(
        grads: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        mu = jax.tree.map(lambda g, m: (1 - b1) * g + decayed(m, b1), grads, state.mu)
        nu = jax.tree.map(lambda g, v: (1 - b2) * jnp.square(g) + b2 * v, grads, state.nu)
        count = optax.safe_increment(state.count)
        ahead = (
            jax.tree.map(
                lambda m, g: b1 * m + (1 - b1) * g,
                optax.tree.bias_correction(mu, b1, optax.safe_increment(count)),
                optax.tree.bias_correction(grads, b1, count),
            )
            if nesterov
            else optax.tree.bias_correction(mu, b1, count)
        )
        scale = optax.tree.bias_correction(nu, b2, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), ahead, scale)
        return direction, optax.ScaleByAdamState(count, optax.tree.cast(mu, mu_dtype), nu)

    return optax.GradientTransformation(adam.init, update)
