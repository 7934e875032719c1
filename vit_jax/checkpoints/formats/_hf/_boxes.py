"""The layers of detectors that give boxes and scores."""

from collections.abc import Iterator

from vit_jax.checkpoints.formats._hf import State


def mlp_pairs(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """Yields the names of the three layers of an MLP, which are counted from 0 and from 1."""
    for number in range(3):
        yield f"{theirs}{number}", f"{ours}/dense{number + 1}"


def rows_first(state: State, layer: str) -> State:
    """Returns a state dict whose last layer of boxes gives y before x, and height before width."""
    for name in (f"{layer}.weight", f"{layer}.bias"):
        rows = state.get(name)
        if rows is not None and rows.shape[:1] == (4,):
            state = {**state, name: rows[[1, 0, 3, 2]]}
    return state
