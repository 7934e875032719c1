"""Muon (Jordan, 2024): orthogonalized momentum for the matrices of blocks, Adam for the rest."""

import math
import re
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from vit_jax.errors import UserError
from vit_jax.optim.groups import is_stacked, name_of, named_leaves
from vit_jax.optim.rules.adamw import adamw

# Attention kernels that map the embedding to heads, [embed, heads, head_dim], have one input axis;
# the other axes are outputs. In all other kernels, the last axis is the only output.
_SPLIT_OUTPUT = re.compile(r".*/(?:query|key|value)/kernel")


class MuonState(NamedTuple):
    """The states: optax's Muon for the matrices of blocks, and Adam for all other parameters."""

    matrices: Any
    others: Any


def muon(
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    consistent_rms: float | None = 0.2,
    mu_dtype: str = "float32",
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    adam_eps: float = 1e-8,
    blocks: str,
) -> optax.GradientTransformation:
    """Returns Muon for every kernel inside the blocks, as a matrix, and Adam for the rest.

    A kernel split into heads is one matrix, [embed, heads·head_dim] or [heads·head_dim, embed]. A
    kernel stacked along layers is one matrix per layer. Adam updates embeddings, heads, norms, and
    biases, as Muon's author recommends.

    ns_steps: the number of Newton-Schulz iterations.
    consistent_rms: the root mean square of each matrix's step, if it has full rank. 0.2 is that of
        AdamW, so the learning rate and decay of AdamW suit both groups (Liu et al., 2025,
        arXiv:2502.16982, section 2.2). None scales by sqrt(max(1, out / in)) instead.
    """
    orthogonal = optax.contrib.scale_by_muon(
        beta=beta,
        nesterov=nesterov,
        ns_steps=ns_steps,
        mu_dtype=mu_dtype,
        weight_dimension_numbers=lambda tree: _dimension_numbers(tree, blocks),
    )
    adam = adamw(adam_b1, adam_b2, adam_eps)

    def init(params: optax.Params) -> MuonState:
        matrices, others = _split(params, blocks)
        if not matrices:
            raise UserError(
                "config.optim.name: muon finds no kernel inside config.optim.blocks; write a "
                "pattern that matches the blocks' parameters, or another optimizer"
            )
        return MuonState(orthogonal.init(matrices), adam.init(others))

    def update(
        grads: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        matrices, others = _split(grads, blocks)
        matrices, muon_state = orthogonal.update(matrices, state.matrices)
        numbers = _dimension_numbers(matrices, blocks)
        matrices = jax.tree.map(lambda u, n: _scale(u, n, consistent_rms), matrices, numbers)
        others, adam_state = adam.update(others, state.others)
        return _merge(matrices, others), MuonState(muon_state, adam_state)

    return optax.GradientTransformation(init, update)


def _dimension_numbers(kernels: optax.Params, blocks: str) -> optax.Params:
    """Returns the input and output axes of each kernel; a layer axis is neither."""

    def numbers(path: tuple, kernel: jax.Array) -> MuonDimensionNumbers:
        name = name_of(path)
        axes = tuple(range(is_stacked(name, blocks), kernel.ndim))
        inputs = axes[:1] if _SPLIT_OUTPUT.fullmatch(name) else axes[:-1]
        return MuonDimensionNumbers(inputs, axes[len(inputs) :])

    return jax.tree_util.tree_map_with_path(numbers, kernels)


def _scale(
    update: jax.Array, numbers: MuonDimensionNumbers, consistent_rms: float | None
) -> jax.Array:
    """Scales an orthogonal step to a size that does not depend on the shape of the matrix."""
    fan_in = math.prod(update.shape[axis] for axis in numbers.reduction_axis)
    fan_out = math.prod(update.shape[axis] for axis in numbers.output_axis)
    if consistent_rms is None:
        return math.sqrt(max(1.0, fan_out / fan_in)) * update
    return consistent_rms * math.sqrt(max(fan_in, fan_out)) * update


def _split(tree: optax.Params, blocks: str) -> tuple[optax.Params, optax.Params]:
    """Splits a tree into the matrices of blocks and the rest, both nested dicts like the tree."""
    parts: tuple[dict, dict] = ({}, {})
    for name, leaf in named_leaves(tree).items():
        is_kernel = re.fullmatch(blocks, name) and name.endswith("/kernel")
        is_matrix = is_kernel and leaf.ndim - is_stacked(name, blocks) >= 2
        parts[0 if is_matrix else 1][name] = leaf
    matrices, others = (flax.traverse_util.unflatten_dict(part, sep="/") for part in parts)
    return matrices, others


def _merge(matrices: optax.Params, others: optax.Params) -> optax.Params:
    named = named_leaves(matrices) | named_leaves(others)
    return flax.traverse_util.unflatten_dict(named, sep="/")
