"""Published schemes for the initial values of a Vision Transformer's parameters.

Norms, LayerScale, registers and the biases of attention are the same in all of them. Adam's steps
soon forget these scales; LAMB's do not, because it moves a kernel by a share of the kernel's norm.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.types import Array

Initializer = Callable[..., Array]


def with_axes(init: Initializer, names: Sequence[str | None]) -> Initializer:
    """Returns `init` with logical names for the axes of the parameter that it makes.

    The names are in a box around the array. `Module.param` opens the box, which the types of Flax
    do not tell.
    """
    return cast(Initializer, nn.with_logical_partitioning(init, tuple(names)))


def of_conv2d(fan_in: int) -> Initializer:
    """Returns the default of PyTorch's `Conv2d`: uniform up to 1 / sqrt(fan_in) either way.

    fan_in: the number of inputs of one output, for the kernel and its bias alike.
    """
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


_zeros = nn.initializers.zeros
_lecun = nn.initializers.lecun_normal()
_xavier = nn.initializers.xavier_uniform()
_tiny = nn.initializers.normal(1e-6)
# DeiT's `trunc_normal_(std=0.02)` truncates at -2 and 2, which is a hundred deviations away.
_normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The initializers of one scheme.

    Attributes:
      kernel: of attention and MLP.
      mlp_bias: of both layers of the MLP.
      patch: of the patch embedding, from its number of inputs: (kernel, bias).
      position: of the learned table of positions, from the width.
      class_token: of the class token.
      head: of the classification head, where it does not start at zero.
    """

    kernel: Initializer = _xavier
    mlp_bias: Initializer = _tiny
    patch: Callable[[int], tuple[Initializer, Initializer]] = lambda fan_in: (_lecun, _zeros)
    position: Callable[[int], Initializer] = lambda width: _normal
    class_token: Initializer = _zeros
    head: Initializer = _lecun


SCHEMES = {
    # vision_transformer, vit_jax/models_vit.py.
    "vision_transformer": Scheme(),
    # big_vision, models/vit.py: `get_posemb` differs.
    "big_vision": Scheme(position=lambda width: nn.initializers.normal(1 / math.sqrt(width))),
    # DeiT III, models_v2.py: `_init_weights` changes linear layers, not the patches' convolution.
    "deit": Scheme(
        kernel=_normal,
        mlp_bias=_zeros,
        patch=lambda fan_in: (of_conv2d(fan_in),) * 2,
        class_token=_normal,
        head=_normal,
    ),
    # flaxformer, bert.py: truncated at two deviations, which leaves a deviation of 0.0176.
    "bert": Scheme(kernel=nn.initializers.truncated_normal(0.02), mlp_bias=_zeros),
    # Flax's defaults, to which both codebases leave the MLPs of Mixers.
    "flax": Scheme(kernel=_lecun, mlp_bias=_zeros),
}
