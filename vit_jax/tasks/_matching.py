"""Boxes on the device: their similarity, the matching of proposals with objects, mosaics."""

import jax
import jax.numpy as jnp
import optax

from vit_jax.types import Array

_EPSILON = 1e-7
_HOPELESS = 1e6
"""The cost of a pair whose cost is not finite: a diverging model must not stall the matching."""


def generalized_iou(a: Array, b: Array) -> Array:
    """Returns generalized IoU in -1..1 of boxes (y0, x0, y1, x1), `[..., 4]` to `[...]`.

    It is the intersection over union, less the share of the smallest enclosing box that neither
    box covers (Rezatofighi et al. 2019). Boxes without area have the IoU 0.
    """
    both = _area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - both
    hull = _area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    return both / (union + _EPSILON) - (hull - union) / (hull + _EPSILON)


def l1(a: Array, b: Array) -> Array:
    """Returns the sum of the differences in center and size (Carion et al. 2020, DETR)."""
    return jnp.abs(_center_and_size(a) - _center_and_size(b)).sum(-1)


def assign(costs: Array, real: Array) -> Array:
    """Returns the proposal of each object, int32 `[b, M]`, such that the sum of costs is least.

    Args:
      costs: `[b, N, M]` of N proposals for M <= N objects.
      real: bool `[b, M]`; the other objects get proposals that no real one needs.
    """
    costs = jnp.where(real[:, None], costs, 0)
    costs = jnp.nan_to_num(costs, nan=_HOPELESS, posinf=_HOPELESS, neginf=-_HOPELESS)

    def of_image(cost: Array) -> Array:
        proposals, objects = optax.assignment.hungarian_algorithm(cost)
        return jnp.zeros(cost.shape[1], jnp.int32).at[objects].set(proposals.astype(jnp.int32))

    return jax.vmap(of_image)(costs)


def mosaic(images: Array, objects: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Returns each image at half its size, in a square with the three before it in the batch.

    Args:
      images: `[b, h, w, c]`, h and w even.
      objects: `boxes` `[b, M, 4]`, and other arrays `[b, M]` of them.

    Returns:
      The mosaics, `[b, h, w, c]`, and their objects, with room for 4 M.
    """
    batch, height, width, channels = images.shape
    half = images.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    parts = [jnp.roll(half, shift, axis=0) for shift in range(4)]
    rows = [jnp.concatenate(parts[i : i + 2], axis=2) for i in (0, 2)]
    corners = [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5)]
    boxes = [
        jnp.roll(objects["boxes"], shift, axis=0) / 2 + jnp.array(corner * 2)[None, None]
        for shift, corner in enumerate(corners)
    ]
    moved = {
        name: jnp.concatenate([jnp.roll(x, shift, axis=0) for shift in range(4)], axis=1)
        for name, x in objects.items()
    }
    return jnp.concatenate(rows, axis=1), moved | {"boxes": jnp.concatenate(boxes, axis=1)}


def _area(low: Array, high: Array) -> Array:
    sides = jnp.maximum(high - low, 0)
    return sides[..., 0] * sides[..., 1]


def _center_and_size(corners: Array) -> Array:
    low, high = corners[..., :2], corners[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], -1)
