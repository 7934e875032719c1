"""The parameters that a model has at an image size: their names and shapes."""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.checkpoints.fit import surgery
from vit_jax.checkpoints.weights import CLS, DECODED, POSITIONS, TOKEN_MIXING, Weights, canonical
from vit_jax.errors import UserError
from vit_jax.models import Traits

DEFAULT_SIDE = 224

_TABLES = re.compile(rf"/position_bias/table$|/blocks_\d+/positions$|^{DECODED}$")
"""Names of tables of places besides the one of positions."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A model and the shapes of its parameters under the names of `Weights`.

    traits: those of the model.
    inputs: shapes of what the model is initialized with.
    grid: (rows, columns) of the positions; None where the model has no table of them, or where the
      checkpoint decides.
    stacked: the towers (`backbone`, `text`) that scan over their blocks.
    """

    model: nn.Module
    traits: Traits
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
        """Returns the model at `image_size`, or at the size that keeps the checkpoint's tokens."""
        backbone, traits = models.backbone_of(model), models.traits_of(model)
        inputs = _inputs(backbone, traits, weights, image_size, channels)
        key = jax.eval_shape(lambda: jax.random.key(0))
        abstract = nn.meta.unbox(
            jax.eval_shape(model.init, models.init_keys(key), inputs)["params"]
        )
        # Zero strides: shapes that can be indexed and cost nothing.
        empty = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), abstract)
        shapes: Mapping[str, tuple[int, ...]]
        shapes = {name: x.shape for name, x in canonical(empty, model).items()}
        grid, table = traits.table_grid, weights.arrays.get(POSITIONS)
        if POSITIONS not in shapes and not any(_TABLES.search(name) for name in shapes):
            grid = None
        elif grid is None and not traits.reads_text:
            grid = _grid(backbone, inputs)
            if image_size is None:
                if table is not None and POSITIONS in shapes:
                    class_row = CLS in shapes and traits.class_token_position
                    shapes = _keep_table(shapes, grid, weights, table, class_row)
                shapes, grid = _keep_other_tables(shapes, weights), None
        tree = abstract if models.has_head(model) else {"backbone": abstract}
        stacked = {path[0] for path in flax.traverse_util.flatten_dict(tree) if "blocks" in path}
        return cls(model, traits, inputs, shapes, grid, stacked)

    @property
    def num_patches(self) -> int | None:
        """The number of rows of the position table that belong to patches."""
        table = self.shapes.get(POSITIONS)
        return None if table is None else table[1] - int(self.class_row)

    @property
    def class_row(self) -> bool:
        """Returns whether the position table has a row for the class token."""
        return {CLS, POSITIONS} <= self.shapes.keys() and self.traits.class_token_position

    def initialize(self, names: Iterable[str], seed: int) -> dict[str, np.ndarray]:
        """Returns the values that training from scratch would give these parameters."""
        wanted = frozenset(names)

        @jax.jit
        def some(key: jax.Array) -> dict[str, jax.Array]:
            inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.inputs)
            params = nn.meta.unbox(self.model.init(models.init_keys(key), inputs)["params"])
            # XLA does not compute what is not returned.
            return {n: x for n, x in canonical(params, self.model).items() if n in wanted}

        values = some(jax.random.key(seed)) if wanted else {}
        return {name: np.asarray(x) for name, x in values.items()}


def _inputs(
    backbone: nn.Module,
    traits: Traits,
    weights: Weights,
    image_size: int | Sequence[int] | None,
    channels: int | None,
) -> Any:
    arrays = weights.arrays
    if traits.reads_text:
        table = arrays.get(POSITIONS, np.empty((1, 1, 1)))
        return models.example_input(backbone, image_size or table.shape[1], 0)
    mixing = arrays.get(TOKEN_MIXING)
    if image_size is None and mixing is not None and traits.kind == "a Mixer":
        stride = models.token_stride(backbone)
        assert stride is not None
        height, width = stride
        image_size = (height, width * mixing.shape[0])
    channels = channels or image_channels(arrays)
    return models.example_input(backbone, image_size or DEFAULT_SIDE, channels)


def image_channels(arrays: Mapping[str, np.ndarray]) -> int:
    """Returns the channels of images that a checkpoint's first kernel reads; 3 without one."""
    for name in ("stem/root/conv", "stem/conv0", "root/conv", "patch_embed"):
        kernel = arrays.get(f"backbone/{name}/kernel")
        if kernel is not None and kernel.ndim == 4:
            return kernel.shape[2]
    return 3


def _grid(backbone: nn.Module, inputs: Any) -> surgery.Grid:
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
    """Returns a checkpoint's positions as the class token's row, or None, and the patches' rows.

    class_token, class_row: whether the model has one, and a row for it. num_patches: those of the
      model's table; None where the checkpoint decides.
    """
    if weights.grid and weights.grid[0] * weights.grid[1] in (table.shape[1], table.shape[1] - 1):
        has_row = weights.grid[0] * weights.grid[1] < table.shape[1]
        return (table[:, :1], table[:, 1:]) if has_row else (None, table)
    has_token = CLS in weights.arrays
    if not has_token and (weights.ours or not class_token):
        return None, table
    row_stored = weights.class_row
    if row_stored is None and weights.ours:
        alike = num_patches is None or table.shape[1] == num_patches + class_row
        row_stored = class_row if alike else None
    return surgery.split_class_row(
        table,
        has_class_token=True,
        row_stored=row_stored if has_token else None,
        num_patches=num_patches,
        assumed=class_row and has_token,
    )


def _keep_other_tables(
    shapes: Mapping[str, tuple[int, ...]], weights: Weights
) -> Mapping[str, tuple[int, ...]]:
    """Returns `shapes` with as many other places as the checkpoint has."""
    held = {name: x.shape for name, x in weights.arrays.items() if _TABLES.search(name)}
    fits = {n: held[n] for n in held if n in shapes and held[n][1:][-1:] == shapes[n][1:][-1:]}
    return {**shapes, **fits}


def _keep_table(
    shapes: Mapping[str, tuple[int, ...]],
    grid: surgery.Grid,
    weights: Weights,
    table: np.ndarray,
    class_row: bool,
) -> Mapping[str, tuple[int, ...]]:
    """Returns `shapes` with as many positions as the checkpoint has patches."""
    if table.ndim != 3:
        raise UserError(f"the position table has shape {table.shape}, not [1, tokens, width]")
    class_token = CLS in shapes
    _, patches = split_table(
        weights, table, class_token=class_token, class_row=class_row, num_patches=None
    )
    _, tokens, width = shapes[POSITIONS]
    class_rows = tokens - grid[0] * grid[1]
    return {**shapes, POSITIONS: (1, patches.shape[1] + class_rows, width)}
