"""Gram anchoring: patches stay as similar to each other as an earlier teacher has them.

(Siméoni et al. 2025, DINOv3, section 4.2.) Only the similarities of patches are held, so that the
features themselves are free to change.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.heads.prototypes import unit
from vit_jax.models.layers.resize import cubic_resize_matrix
from vit_jax.types import Array


def gram_losses(student: Array, teacher: Array) -> Array:
    """Returns the mean squared difference of two matrices of cosines, float32 `[...]`.

    The paper has the sum over all pairs of patches of a crop; the mean does not change with the
    number of patches, and neither does the weight that goes with it.

    Args:
      student, teacher: tokens `[..., patches, width]` of any length; the widths may differ.
    """
    target = jax.lax.stop_gradient(_cosines(teacher))
    return jnp.square(_cosines(student) - target).mean((-2, -1))


def _cosines(tokens: Array) -> Array:
    rows = unit(tokens.astype(jnp.float32))
    return jnp.einsum("...nd,...md->...nm", rows, rows, precision="highest")


def resized_tokens(tokens: Array, old: Sequence[int], new: Sequence[int]) -> Array:
    """Resizes tokens `[..., rows * columns, width]` bicubically from one grid to another."""
    rows, columns = (
        cubic_resize_matrix(o, n).astype(np.float32) for o, n in zip(old, new, strict=True)
    )
    grid = tokens.reshape(*tokens.shape[:-2], *old, tokens.shape[-1]).astype(jnp.float32)
    grid = jnp.einsum("ip,jq,...pqd->...ijd", rows, columns, grid, precision="highest")
    return grid.reshape(*tokens.shape[:-2], new[0] * new[1], tokens.shape[-1])
