"""The projection head of self-distillation: an MLP, and cosines to learned prototypes.

dense1/, dense2/, ...       {kernel `[in, out]`, bias}, with GELU between them
prototypes/
  kernel                    [bottleneck, num_prototypes], one direction for each prototype
  scale                     [num_prototypes], the length of each direction
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.errors import UserError
from vit_jax.models.layers.basic import ACTIVATIONS, Linear, check_least, lift
from vit_jax.models.layers.initialization import with_axes
from vit_jax.types import Array

_EPSILON = 1e-12
_MOST_LAYERS = 100


class PrototypeHead(nn.Module):
    """The head of DINO (Caron et al. 2021, section 3.1 and appendix C), iBOT and DINOv2.

    An MLP maps to a bottleneck, whose vectors are normalized to length 1. The last layer has no
    bias, and its weights are normalized (Salimans and Kingma 2016): the logit of a prototype is its
    scale times the cosine between the vector and the prototype's direction.

    Attributes:
      num_prototypes: the number of logits; 65,536 in DINO for ImageNet.
      depth: the number of dense layers, 1 or more, the one to the bottleneck included.
      hidden, bottleneck: the widths of the MLP; 2,048 and 256 in the paper.
      dtype: the dtype of the MLP; normalization and logits are float32.
    """

    num_prototypes: int
    depth: int = 3
    hidden: int = 2048
    bottleneck: int = 256
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        check_least(1, depth=self.depth, num_prototypes=self.num_prototypes)
        check_least(1, hidden=self.hidden, bottleneck=self.bottleneck)
        if self.depth > _MOST_LAYERS:
            raise UserError(f"depth={self.depth}: a head has at most {_MOST_LAYERS} layers")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps vectors `[..., dim]` to float32 logits `[..., num_prototypes]`."""
        init = nn.initializers.truncated_normal(0.02)
        sizes = [self.hidden] * (self.depth - 1) + [self.bottleneck]
        for i, size in enumerate(sizes, start=1):
            dense = Linear(
                (size,), ("embed", "mlp"), dtype=self.dtype, kernel_init=init, name=f"dense{i}"
            )
            x = dense(x)
            x = ACTIVATIONS["gelu"](x) if i < self.depth else x
        x = unit(x.astype(jnp.float32))
        return _Prototypes(self.num_prototypes, name="prototypes")(x)


class _Prototypes(nn.Module):
    count: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # The default of PyTorch's linear layers, with which DINO and DINOv2 start.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        init = with_axes(init, ("embed", "vocab"))
        kernel = self.param("kernel", init, (x.shape[-1], self.count), jnp.float32)
        ones = with_axes(nn.initializers.ones, ("vocab",))
        scale = self.param("scale", ones, (self.count,), jnp.float32)
        return x @ (kernel * lift(scale / jnp.linalg.norm(kernel, axis=0), 2))


def unit(x: Array, epsilon: float = _EPSILON) -> Array:
    """Returns `x` divided by the larger of its length along the last axis and `epsilon`."""
    squared = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, epsilon**2))
