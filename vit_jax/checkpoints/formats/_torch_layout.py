"""PyTorch's layouts of the arrays that every model here is made of.

A dense weight is `[out, in]`, a convolution's `[out, in, h, w]`, attention keeps its heads within
the channels, and a norm's scale is called weight.
"""

from collections.abc import Mapping

import numpy as np

from vit_jax.checkpoints.weights import Renames, add


def from_state(
    state: Mapping[str, np.ndarray], names: Renames
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays of a state dict under our names, and the names that the table does not know.

    Attention kernels come as matrices: a state dict does not tell the number of heads.

    Raises:
      UserError: two arrays with different values have one of our names.
    """
    arrays: dict[str, np.ndarray] = {}
    unknown = []
    for name, array in state.items():
        path = names.to_ours(name.replace(".", "/"))
        if path is None:
            unknown.append(name)
            continue
        add(arrays, *_in_our_layout(path, array), name)
    return arrays, unknown


def _in_our_layout(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Returns the full path of an array, and its values in our layout."""
    module, _, leaf = path.rpartition("/")
    if path.endswith("/position_bias/table"):
        return path, array
    if leaf != "weight":
        return path, _flat(leaf, array)
    if array.ndim == 1 or (array.ndim == 3 and array.shape[:2] == (1, 1)):
        return f"{module}/scale", array.reshape(-1)
    if module == "head" and array.ndim == 4:
        return "head/kernel", array[:, :, 0, 0].T  # A convolution over a pooled map.
    return f"{module}/kernel", _kernel(array)


def _kernel(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T


def to_state(arrays: Mapping[str, np.ndarray], names: Renames) -> dict[str, np.ndarray]:
    """The inverse of `from_state`. Raises `KeyError` for an array without a name there."""
    state = {}
    for path, array in arrays.items():
        module, _, leaf = path.rpartition("/")
        is_weight = leaf in ("kernel", "scale")
        theirs = names.to_theirs(f"{module}/weight" if is_weight else path)
        if theirs is None:
            raise KeyError(path)
        value = _weight(module, array) if leaf == "kernel" else _flat(leaf, array)
        state[theirs.replace("/", ".")] = np.ascontiguousarray(value)
    return state


def _flat(leaf: str, array: np.ndarray) -> np.ndarray:
    return array.reshape(-1) if leaf in ("bias", "scale") else array


def _weight(module: str, array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 3:
        merged = (-1, array.shape[-1]) if module.endswith("/out") else (array.shape[0], -1)
        return array.reshape(merged).T
    return array.T
