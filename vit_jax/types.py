"""Types that every floor of the house shares. Imports nothing of ours."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

Array = jax.Array
Params = Mapping[str, Any]
Batch = Mapping[str, Array | np.ndarray]


@flax.struct.dataclass
class Features:
    """What every backbone returns, so that every head fits every backbone.

    grid: `[batch, height, width, dim]`, the last token or feature map (after the final norm).
    pooled: `[batch, dim]`, one vector an image; None where the backbone was built without pooling.
    stages: maps of decreasing resolution, each `[batch, h, w, dim_i]`; a plain ViT has one.
    distill: `[batch, dim]`, what a head that imitates a teacher reads; None where that is `pooled`.
    registers: `[batch, num_registers, dim]`, tokens that stand for no place; None without any.
    tokens: `[batch, n, dim]`, the encoded patches of a model that cuts patches; None of others.
    kept: `[batch, n]`, the numbers of these patches where only some were encoded; else None.
    """

    grid: Array | None
    pooled: Array | None
    stages: tuple[Array, ...] = ()
    distill: Array | None = None
    registers: Array | None = None
    tokens: Array | None = None
    kept: Array | None = None


class ArraySpec(NamedTuple):
    """Shape (batch axis left out) and dtype of one array of a batch.

    vocab: of token numbers, the vocabulary that made them of texts (see
    `vit_jax.data.tokenizer`); "" of everything else, and where nobody tells.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    vocab: str = ""


class DataInfo(NamedTuple):
    """What a task must know about the data before it can build its head.

    spec: the pipeline's arrays, name → shape and dtype of one example.
    num_classes: classes of the labels. class_names: their names, if the source has them.
    """

    spec: Mapping[str, ArraySpec]
    num_classes: int
    class_names: tuple[str, ...] | None = None
