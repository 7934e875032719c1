"""LAMB (You et al., 2020): Adam's direction rescaled layer by layer, for very large batches."""

import jax
import optax

from vit_jax.optim.groups import is_stacked, name_of
from vit_jax.optim.rule import Rule


def lamb(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    only_kernels: bool = False,
    blocks: str,
) -> Rule:
    """Returns Adam's direction plus decay, scaled in each layer to the norm of the parameter.

    only_kernels: scales only kernels; other parameters get Adam's step unchanged. By default,
        NVIDIA's FusedLAMB also leaves parameters without decay unscaled.

    The layers of a stacked parameter are scaled one by one, so scanning over the blocks does not
    change the result.
    """
    ratio = optax.scale_by_trust_ratio()

    def per_array(update: jax.Array, param: jax.Array) -> jax.Array:
        return ratio.update(update, optax.EmptyState(), param)[0]

    def rescale(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        if only_kernels and not name_of(path).endswith("/kernel"):
            return update
        per_layer = jax.vmap(per_array) if is_stacked(name_of(path), blocks) else per_array
        return per_layer(update, param)

    trust = optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(rescale, updates, params)
    )
    return Rule(optax.scale_by_adam(b1, b2, eps), after_decay=trust)
