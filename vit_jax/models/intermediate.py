"""The tokens of a ViT's last blocks, for probes and dense heads that read several of them."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from vit_jax.models.layers.basic import outputs_of, token_stride
from vit_jax.models.layers.transformer import Block
from vit_jax.models.vit import VisionTransformer
from vit_jax.types import Array, Params


class LastLayers(NamedTuple):
    """The tokens of the last blocks, the oldest block first, each after the model's last norm.

    cls: `[blocks, batch, width]`, the class token; None if the model has none.
    patches: `[blocks, batch, n, width]`, row by row.
    """

    cls: Array | None
    patches: Array


def last_layers(
    backbone: VisionTransformer, params: Params, images: Array, count: int
) -> LastLayers:
    """Returns the tokens of the last `count` blocks for images `[batch, h, w, channels]`.

    Raises:
      ValueError: the model has fewer blocks.
    """
    if not 1 <= count <= backbone.depth:
        raise ValueError(f"{count} blocks are wanted, of {backbone.depth}")
    _, state = backbone.apply(
        {"params": params}, images, capture_intermediates=_is_block, mutable=["intermediates"]
    )
    x = _outputs(state["intermediates"], backbone)[-count:]
    if backbone.last_norm:
        norm = backbone.block_spec().make_norm("norm")
        x = outputs_of(norm, nn.meta.unbox(params)["norm"], x)
    prefix = x.shape[2] - _num_patches(backbone, images)
    cls = x[:, :, 0] if "cls" in params else None
    return LastLayers(cls, x[:, :, prefix:])


def _is_block(module: nn.Module, method: str) -> bool:
    return isinstance(module, Block) and method == "__call__"


def _outputs(found: Mapping, backbone: VisionTransformer) -> Array:
    """Returns what every block returned, `[depth, batch, tokens, width]`."""
    if backbone.scan:
        return found["blocks"]["__call__"][0][0]
    blocks = (found[f"blocks_{i}"]["__call__"][0][0] for i in range(backbone.depth))
    return jnp.stack(list(blocks))


def _num_patches(backbone: VisionTransformer, images: Array) -> int:
    stride = token_stride(backbone)
    assert stride is not None
    down, across = stride
    return (images.shape[1] // down) * (images.shape[2] // across)
