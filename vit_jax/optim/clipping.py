"""Clipping of gradients: by their global norm, or by the norm of each part of the parameters."""

import re

import jax
import jax.numpy as jnp
import optax

from vit_jax.optim.groups import STUDENTS, is_stacked, name_of
from vit_jax.types import Params

SCOPES = ("global", "module", "parameter")
"""The parts of the parameters that `config.optim.clip_scope` may give a norm of their own."""


def clip(grads: Params, max_norm: float, scope: str, blocks: str) -> Params:
    """Returns the gradients of each part, times min(1, max_norm / norm of the part).

    There is no epsilon, so gradients below the limit are unchanged.

    Args:
      scope: "global" for one norm of all gradients; "module" for a norm of each entry of the tree,
        such as the backbone and each head (Oquab et al. 2023, DINOv2), where arrays outside of
        modules, such as a mask token, are the backbone's, and the modules of each further student
        are its own; "parameter" for a norm of each parameter (Caron et al. 2021, DINO). The layers
        of a stacked parameter have norms of their own. Queries, keys and values of an attention
        count as one parameter, as they are in the published code.
      blocks: `config.optim.blocks`, which tells the stacked parameters.
    """
    if scope == "global":
        return clip_by_global_norm(grads, max_norm)

    def by_layer(path: tuple) -> bool:
        return scope == "parameter" and is_stacked(name_of(path), blocks)

    def square(path: tuple, g: jax.Array) -> jax.Array:
        axes = tuple(range(int(by_layer(path)), g.ndim))
        return jnp.square(g.astype(jnp.float32)).sum(axes)

    squares: dict[str, jax.Array] = {}
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        part = _part(path, scope)
        squares[part] = squares.get(part, 0.0) + square(path, g)

    def scaled(path: tuple, g: jax.Array) -> jax.Array:
        scale = jnp.minimum(1.0, max_norm / jnp.sqrt(squares[_part(path, scope)]))
        return g * scale.reshape(scale.shape + (1,) * (g.ndim - scale.ndim))

    return jax.tree_util.tree_map_with_path(scaled, grads)


def clip_by_global_norm(grads: Params, max_norm: float) -> Params:
    """Returns `grads · min(1, max_norm / norm)`.

    There is no epsilon, so gradients below the limit are unchanged.
    """
    scale = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))
    return jax.tree.map(lambda g: g * scale, grads)


def _part(path: tuple, scope: str) -> str:
    """Returns the name of the part of the parameters that a gradient belongs to."""
    name = name_of(path)
    if scope == "module":
        student, parts = "", name.split("/")
        if parts[0] == STUDENTS:  # A further student has the modules that the first one has.
            student, parts = f"{parts[1]}/", parts[2:]
        return student + (parts[0] if len(parts) > 1 else "backbone")
    return re.sub(r"/(?:query|key|value)/", "/qkv/", name)
