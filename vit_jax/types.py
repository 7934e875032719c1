"""Types that all parts of the package share. This module imports nothing from the package."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = Mapping[str, Any]
Batch = Mapping[str, Array]
"""The arrays of a batch on the devices, as the functions of tasks see them, by name."""
HostBatch = Mapping[str, np.ndarray]
"""The arrays of a batch as the pipeline makes them, by name."""
Numbers = TypeVar("Numbers", Array, np.ndarray)
"""Arrays of JAX, or arrays of NumPy, where a function takes and returns either kind."""
Images = np.ndarray | Sequence[np.ndarray]
"""Several images on the host: one array, or a list of arrays that may differ in size."""


class Features(flax.struct.PyTreeNode):
    """The output of every backbone, so that every head fits every backbone.

    Attributes:
      grid: `[batch, height, width, dim]`, the last token or feature map (after the final norm).
      pooled: `[batch, dim]`, one vector per image; None if the backbone was built without pooling.
      stages: maps of decreasing resolution, each `[batch, h, w, dim_i]`; a plain ViT has one.
      distill: `[batch, dim]`, the input of a distillation head; None if that is `pooled`.
      registers: `[batch, num_registers, dim]`, tokens without a position; None if there are none.
      tokens: `[batch, n, dim]`, the encoded patches of a model that uses patches; else None.
      kept: `[batch, n]`, the numbers of these patches if only some were encoded; else None.
    """

    grid: Array | None
    pooled: Array | None
    stages: tuple[Array, ...] = ()
    distill: Array | None = None
    registers: Array | None = None
    tokens: Array | None = None
    kept: Array | None = None

    def vector(self) -> Array:
        """Returns one vector per image, float32 `[batch, dim]`: `pooled`, or the mean of `grid`."""
        if self.pooled is not None:
            return self.pooled.astype(jnp.float32)
        assert self.grid is not None, "a model returns a map or a vector"
        return self.grid.mean((1, 2)).astype(jnp.float32)


class ArraySpec(NamedTuple):
    """The shape (without the batch axis) and dtype of one array of a batch.

    vocab: the vocabulary of token numbers (see `vit_jax.data.tokenizer`); "" for all other arrays,
    and if it is unknown.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    vocab: str = ""


class DataInfo(NamedTuple):
    """Information about the data that a task needs to build its head.

    spec: the shape and dtype of one example of each array of the pipeline, by name.
    num_classes: the number of classes of the labels.
    class_names: the names of the classes, if the source has them.
    class_counts: the number of training examples of each class; () if the source does not know it,
      None if it was not asked, because nothing is trained.
    """

    spec: Mapping[str, ArraySpec]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    class_counts: tuple[int, ...] | None = None
