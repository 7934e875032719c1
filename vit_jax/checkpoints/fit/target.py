"""What a model wants: the names and shapes of its parameters at an image size."""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoints.fit import surgery
from vit_jax.checkpoints.weights import Weights, backbone_of, canonical, has_head
from vit_jax.errors import UserError

DEFAULT_SIDE = 224


@dataclasses.dataclass(frozen=True)
class Target:
    """A model and the shapes of its parameters under the names of `Weights`.

    grid: (rows, columns) of the positions; None where the model has no table of them, or where the
      checkpoint decides.
    inputs: shapes of what the model is initialised with.
    stacked: the towers (`backbone`, `text`) that scan over their blocks.
    """

    model: nn.Module
    inputs: Any
    shapes: Mapping[str, tuple[int, ...]]
    grid: surgery.Grid | None
    stacked: Collection[str]

    @classmethod
    def create(
        cls,
        model: nn.Module,
        weights: Weights,
        image_size: int | Sequence[int] | None,
        channels: int | None,
    ) -> "Target":
        """The model at `image_size`, or at the size that keeps the checkpoint's tokens."""
        backbone = backbone_of(model)
        inputs = _inputs(backbone, weights, image_size, channels)
        key = jax.eval_shape(lambda: jax.random.key(0))
        abstract = nn.meta.unbox(jax.eval_shape(model.init, key, inputs)["params"])
        # Zero strides: shapes that can be indexed and cost nothing.
        empty = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), abstract)
        shapes = {name: x.shape for name, x in canonical(empty, model).items()}
        grid = _grid(backbone, inputs) if "backbone/pos_embed" in shapes else None
        table = weights.arrays.get("backbone/pos_embed")
        if grid and image_size is None and table is not None and _grows(backbone):
            class_row = "backbone/cls" in shapes and backbone.class_token_position
            shapes, grid = _keep_table(shapes, grid, weights, table, class_row), None
        tree = abstract if has_head(model) else {"backbone": abstract}
        stacked = {path[0] for path in flax.traverse_util.flatten_dict(tree) if "blocks" in path}
        return cls(model, inputs, shapes, grid, stacked)

    @property
    def num_patches(self) -> int | None:
        """Rows of the position table that belong to patches."""
        table = self.shapes.get("backbone/pos_embed")
        return None if table is None else table[1] - int(self.class_row)

    @property
    def class_row(self) -> bool:
        """Whether the position table has a row for the class token."""
        has_both = {"backbone/cls", "backbone/pos_embed"} <= self.shapes.keys()
        return has_both and getattr(backbone_of(self.model), "class_token_position", False)

    def initialise(self, names: Iterable[str], seed: int) -> dict[str, np.ndarray]:
        """The values that training from scratch would give these parameters."""
        wanted = frozenset(names)

        @jax.jit
        def some(key: jax.Array) -> dict[str, jax.Array]:
            inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.inputs)
            params = nn.meta.unbox(self.model.init(key, inputs)["params"])
            # What is not returned is not computed.
            return {n: x for n, x in canonical(params, self.model).items() if n in wanted}

        values = some(jax.random.key(seed)) if wanted else {}
        return {name: np.asarray(x) for name, x in values.items()}


def _inputs(
    backbone: nn.Module,
    weights: Weights,
    image_size: int | Sequence[int] | None,
    channels: int | None,
) -> Any:
    arrays = weights.arrays
    if is_text(backbone):
        length = image_size or arrays.get("backbone/pos_embed", np.empty((1, 1, 1))).shape[1]
        return backbone.example_input(length, 0)
    held = image_channels(arrays)
    mixing = arrays.get("backbone/blocks_0/token_mixing/dense1/kernel")
    if image_size is None and mixing is not None and hasattr(backbone, "tokens_mlp_dim"):
        height, width = _pair(backbone.patch_size)
        image_size = (height, width * mixing.shape[0])
    size, channels = _pair(image_size or DEFAULT_SIDE), channels or held
    if hasattr(backbone, "example_input"):
        return backbone.example_input(size, channels)
    return jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)


def image_channels(arrays: Mapping[str, np.ndarray]) -> int:
    """Channels of the images that a checkpoint's first kernel reads; 3 where none does."""
    for name in ("stem/root/conv", "root/conv", "patch_embed"):
        kernel = arrays.get(f"backbone/{name}/kernel")
        if kernel is not None and kernel.ndim == 4:
            return kernel.shape[2]
    return 3


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _grows(backbone: nn.Module) -> bool:
    """Whether the position table follows the image size."""
    return not hasattr(backbone, "table_grid") and not is_text(backbone)


def is_text(backbone: nn.Module) -> bool:
    """Whether a backbone reads tokens instead of images."""
    return hasattr(backbone, "vocab_size")


def _grid(backbone: nn.Module, inputs: Any) -> surgery.Grid | None:
    if not _grows(backbone):
        side = getattr(backbone, "table_grid", None)
        return None if side is None else (side, side)
    init = functools.partial(backbone.init_with_output, jax.random.key(0))
    features: Any = jax.eval_shape(init, inputs)[0]
    return features.grid.shape[1:3]


def split_table(
    weights: Weights,
    table: np.ndarray,
    *,
    class_token: bool,
    class_row: bool,
    num_patches: int | None,
) -> tuple[np.ndarray | None, np.ndarray]:
    """A checkpoint's positions as the class token's row, or None, and the patches' rows.

    class_token, class_row: whether the model has one, and a row for it. num_patches: of its table;
      None where the checkpoint decides.
    """
    if weights.grid and weights.grid[0] * weights.grid[1] in (table.shape[1], table.shape[1] - 1):
        has_row = weights.grid[0] * weights.grid[1] < table.shape[1]
        return (table[:, :1], table[:, 1:]) if has_row else (None, table)
    beside = "backbone/cls" in weights.arrays
    if not beside and (weights.ours or not class_token):
        return None, table
    row_stored = weights.class_row
    if row_stored is None and weights.ours:
        alike = num_patches is None or table.shape[1] == num_patches + class_row
        row_stored = class_row if alike else None
    return surgery.split_class_row(
        table,
        has_class_token=True,
        row_stored=row_stored if beside else None,
        num_patches=num_patches,
        assumed=class_row and beside,
    )


def _keep_table(
    shapes: Mapping[str, tuple[int, ...]],
    grid: surgery.Grid,
    weights: Weights,
    table: np.ndarray,
    class_row: bool,
) -> Mapping[str, tuple[int, ...]]:
    """`shapes` with as many positions as the checkpoint's patches."""
    if table.ndim != 3:
        raise UserError(f"the position table has shape {table.shape}, not [1, tokens, width]")
    class_token = "backbone/cls" in shapes
    _, patches = split_table(
        weights, table, class_token=class_token, class_row=class_row, num_patches=None
    )
    _, tokens, width = shapes["backbone/pos_embed"]
    class_rows = tokens - grid[0] * grid[1]
    return {**shapes, "backbone/pos_embed": (1, patches.shape[1] + class_rows, width)}
