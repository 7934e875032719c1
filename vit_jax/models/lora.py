"""Low-rank adapters: fine-tuning by small changes to frozen kernels.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models", section 4.1. The model runs
with W + down · up in place of the frozen kernel W. The factors are stored next to the model's
parameters:

    lora/PATH OF THE KERNEL/down    [inputs..., rank]     normal, variance 1 / inputs
    lora/PATH OF THE KERNEL/up      [rank, outputs...]    zero: training starts with W unchanged

Both have a leading axis of layers if the kernel has one. The paper's factor alpha / rank is 1 here:
according to the paper, tuning alpha is equivalent to tuning the learning rate, which
`optim.lr_mults` sets by name. The parameters alone are therefore sufficient to merge the adapters
into the kernels.
"""

import math
import re
import string
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.types import Array, Numbers, Params

KEY = "lora"
"""The name of the factors among the parameters."""

ATTENTION_AND_MLP = r"(?:.*/)?blocks(?:_\d+)?/(?:attn|mlp)/\w+/kernel"
"""A pattern of the whole names of the kernels of a transformer's blocks."""

_TOWERS = ("backbone", "text")


def frozen(params: Params) -> list[str]:
    """Returns patterns of the frozen parameters, which are those of the adapted towers.

    The backbone is always one of these towers; heads are not.
    """
    names = (name.split("/") for name in flax.traverse_util.flatten_dict(params[KEY], sep="/"))
    adapted = {"backbone", *(part for name in names for part in name)}
    return [rf"(?!{KEY}/)(?:.*/)?{tower}/.*" for tower in _TOWERS if tower in adapted]


def init(key: Array, params: Params, *, rank: int, targets: str) -> Params:
    """Returns the factors of every kernel whose whole name `targets` matches.

    Args:
      key: for random numbers.
      params: boxed with their logical axis names; only shapes are read.
      rank: the rank of the products.
      targets: a regular expression.

    Returns:
      A tree of factors, boxed with their logical axis names.

    Raises:
      UserError: no kernel matches, or the rank is not smaller than that of every kernel.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    kernels = {name: box for name, box in flat.items() if re.fullmatch(targets, name)}
    if not kernels:
        shown = [name for name in flat if name.endswith("/kernel")][:3]
        raise UserError(
            f"config.task.lora.targets: {targets!r} matches no whole name; kernels are called"
            f" {', '.join(shown)}"
        )
    keys = jax.random.split(key, len(kernels))
    factors = {
        name: _factors(key, name, box, rank)
        for key, (name, box) in zip(keys, kernels.items(), strict=True)
    }
    return flax.traverse_util.unflatten_dict(factors, sep="/")


def merge(params: Params) -> Params:
    """Returns the model's own parameters, with the adapters, if any, added into their kernels."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return flax.traverse_util.unflatten_dict(merge_named(flat), sep="/")


def merge_named(arrays: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Returns `merge` of arrays that are given by full name, as in a checkpoint."""
    merged = {name: array for name, array in arrays.items() if not name.startswith(f"{KEY}/")}
    for name, kernel in merged.items():
        down, up = (arrays.get(f"{KEY}/{name}/{factor}") for factor in ("down", "up"))
        if down is not None and up is not None:
            merged[name] = kernel + _product(down, up, kernel.ndim)
    return merged


def _factors(key: Array, name: str, box: nn.LogicallyPartitioned, rank: int) -> dict[str, Any]:
    """Returns the two factors of one kernel, which is divided at its axis `embed`.

    The axes before it are inputs and those from it on are outputs, unless `embed` comes first, as
    the only input.
    """
    shape, names = box.value.shape, box.names
    first = int(names[0] == "layers")
    divide = first + 1 if names[first] == "embed" else len(names) - 1
    inputs, outputs = shape[first:divide], shape[divide:]
    if not 0 < rank < min(math.prod(inputs), math.prod(outputs)):
        raise UserError(
            f"config.task.lora.rank={rank}: {name} is {math.prod(inputs)}×{math.prod(outputs)}; "
            "write a rank between 0 and the smaller of the two"
        )
    down = jax.random.normal(key, (*shape[:divide], rank)) * math.prod(inputs) ** -0.5
    up = jnp.zeros((*shape[:first], rank, *outputs))
    return {
        "down": nn.LogicallyPartitioned(down, (*names[:divide], None)),
        "up": nn.LogicallyPartitioned(up, (*names[:first], None, *names[divide:])),
    }


def _product(down: Numbers, up: Numbers, ndim: int) -> Any:
    """Returns `down · up` for each layer, for a kernel of `ndim` axes."""
    num_layers = down.ndim + up.ndim - 2 - ndim
    letters = string.ascii_lowercase[:ndim]
    divide = down.ndim - 1
    layers, inputs, outputs = letters[:num_layers], letters[num_layers:divide], letters[divide:]
    # In full precision, so that training and every export see the same kernel.
    return jnp.einsum(
        f"{layers}{inputs}z,{layers}z{outputs}->{letters}", down, up, precision="highest"
    )
