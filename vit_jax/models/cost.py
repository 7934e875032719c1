"""Counts parameters and FLOPs of a model from its shapes alone; nothing is computed."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from vit_jax.models.layers.basic import init_keys, pair
from vit_jax.models.traits import backbone_of, text_tower_of


def param_count(model: nn.Module, image_size: int | Sequence[int], channels: int = 3) -> int:
    """Returns the number of parameters of `model` at `image_size` (side, or height and width)."""
    leaves = jax.tree.leaves(_abstract_params(model, example_input(model, image_size, channels)))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def flops(model: nn.Module, image_size: int | Sequence[int], channels: int = 3) -> int:
    """Returns the FLOPs of the forward pass of one image, and of its text if it has one.

    Counts the matrix products and convolutions of the traced model, a multiply-add as 2; a training
    step costs about three times as much. XLA's own count is of no use: it takes the body of a loop
    once, and sees nothing of fused attention.
    """
    inputs = example_input(model, image_size, channels)
    params = _abstract_params(model, inputs)
    other_tower = text_tower_of(model)
    beside = flops(other_tower, model.text_length, 0) if other_tower else 0

    def forward(params: Any, inputs: Any) -> Any:
        # Asking for attention weights makes every implementation spell its products out.
        return model.apply({"params": params}, inputs, mutable=["intermediates"])

    return beside + product_flops(jax.make_jaxpr(forward)(params, inputs).jaxpr)


def example_input(model: nn.Module, image_size: int | Sequence[int], channels: int) -> Any:
    """Returns the shape and dtype of one image, or of what else the backbone says that it takes.

    A text tower takes `image_size` tokens, which have no channels.
    """
    backbone = backbone_of(model)
    if hasattr(backbone, "example_input"):
        return backbone.example_input(image_size, channels)
    return jax.ShapeDtypeStruct((1, *pair(image_size), channels), jnp.float32)


def _abstract_params(model: nn.Module, inputs: Any) -> Any:
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    variables = jax.eval_shape(model.init, init_keys(key), inputs)

    def is_box(x: Any) -> bool:
        return isinstance(x, nn.LogicallyPartitioned)

    # nn.meta.unbox would also constrain their sharding, which shapes alone do not bear.
    return jax.tree.map(
        lambda x: x.value if is_box(x) else x, variables.get("params", {}), is_leaf=is_box
    )


def product_flops(jaxpr: Any) -> int:
    """Returns the FLOPs of all products of a traced program, with loops multiplied out."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot_flops(eqn)
        elif name == "conv_general_dilated":
            total += _conv_flops(eqn)
        else:
            times = eqn.params["length"] if name == "scan" else 1
            total += times * sum(product_flops(inner) for inner in jaxprs_in_params(eqn.params))
    return total


def _dot_flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _conv_flops(eqn: Any) -> int:
    """Taps outside a padded image are counted too, as the field does."""
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // out_features
