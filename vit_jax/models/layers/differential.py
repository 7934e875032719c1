"""Differential attention (Ye et al. 2025, "Differential Transformer")."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models.layers.basic import make_norm
from vit_jax.models.layers.initialization import with_axes
from vit_jax.types import Array

INITIAL = 0.8
"""The limit of the paper's initial values for deep layers, with which all layers start here."""

NORM_EPSILON = 1e-5


class Difference(nn.Module):
    """The difference of two attention maps per head, the norm of its output, and their weight.

    The maps of heads 2 h and 2 h + 1 are subtracted, the second times lambda = exp(q1 k1) -
    exp(q2 k2) + initial (section 2.1 of the paper). The output is normed within each head and
    scaled by 1 - initial.

    Parameters: lambda_q1, lambda_k1, lambda_q2, lambda_k2 `[head_dim / 2]`; norm/scale
    `[head_dim]`; initial `[1]`, which the paper keeps fixed at a value for each layer.
    """

    head_dim: int
    dtype: DTypeLike

    def setup(self) -> None:
        init = with_axes(nn.initializers.normal(0.1), ("head_dim",))
        shape = (self.head_dim // 2,)
        names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
        self.lambdas = [self.param(name, init, shape, jnp.float32) for name in names]
        constant = with_axes(nn.initializers.constant(INITIAL), (None,))
        self.initial = self.param("initial", constant, (1,), jnp.float32)
        self.norm = make_norm(
            "rmsnorm", name="norm", dtype=self.dtype, epsilon=NORM_EPSILON, axis="head_dim"
        )

    def weights(self, weights: Array) -> Array:
        """Returns weights `[b, heads, q, k]` of two maps for each head, `[b, 2 * heads, q, k]`."""
        q1, k1, q2, k2 = self.lambdas
        factor = jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + self.initial[0]
        return weights[:, 0::2] - factor * weights[:, 1::2]

    def normed(self, y: Array) -> Array:
        """Returns the output `[b, q, heads, head_dim]`, normed and scaled."""
        return self.norm(y) * (1.0 - self.initial[0]).astype(y.dtype)
