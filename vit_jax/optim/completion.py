"""Completes the optimizer's state of a checkpoint for parameters that were not trained before."""

from collections.abc import Container
from typing import Any

import jax

from vit_jax.optim.groups import name_of, named_leaves
from vit_jax.types import Params


def complete(
    state: dict[str, Any], fresh: dict[str, Any], params: Params
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Replaces what is None in a restored state, by rule, with the values before a first update.

    New moments join the old ones if each array of the rule's state belongs to one parameter, as
    momentum does. A rule that counts the updates of all its parameters together starts anew as a
    whole: corrected by the count of the old moments, new ones that begin at zero would make the
    first updates several times too large.

    Args:
      fresh: the state before the first update of `params`.

    Returns:
      The state without None, and the names of the rules that start anew although the checkpoint
      has a part of their state.
    """
    owners = named_leaves(params).keys()
    whole, anew = {}, []
    for rule, start in fresh.items():
        leaves = jax.tree_util.tree_leaves_with_path(state[rule], is_leaf=_is_none)
        lacks = [leaf is None for _, leaf in leaves]
        is_shared = any(not _has_owner(name_of(path), owners) for path, _ in leaves)
        if all(lacks) or (any(lacks) and is_shared):
            whole[rule] = start
            anew += [] if all(lacks) else [rule]
        else:
            whole[rule] = filled(state[rule], start)
    return whole, tuple(anew)


def filled(tree: Any, fresh: Any) -> Any:
    """Returns a tree in which leaves that are None are those of `fresh`."""
    return jax.tree.map(lambda old, new: new if old is None else old, tree, fresh, is_leaf=_is_none)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _has_owner(name: str, owners: Container[str]) -> bool:
    """Returns whether an array of the state belongs to one parameter: its path ends in the path."""
    parts = name.split("/")
    return any("/".join(parts[start:]) in owners for start in range(len(parts)))
