"""Attention within windows of the patch grid, for images of many tokens."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Windows:
    """A grid cut into squares of `side` tokens that do not overlap (Li et al. 2022, ViTDet).

    rows, columns: of the grid. It is padded below and at the right to whole windows; no token of
      the grid sees the padding.
    """

    rows: int
    columns: int
    side: int

    @property
    def counts(self) -> tuple[int, int]:
        """Windows down and across."""
        return -(-self.rows // self.side), -(-self.columns // self.side)

    def split(self, x: Array) -> Array:
        """Maps `[batch, rows * columns, ...]` to `[batch * windows, side * side, ...]`."""
        batch, _, *rest = x.shape
        (down, across), side = self.counts, self.side
        x = x.reshape(batch, self.rows, self.columns, *rest)
        missing = (0, down * side - self.rows), (0, across * side - self.columns)
        x = jnp.pad(x, ((0, 0), *missing, *((0, 0) for _ in rest)))
        x = x.reshape(batch, down, side, across, side, *rest).swapaxes(2, 3)
        return x.reshape(batch * down * across, side * side, *rest)

    def join(self, x: Array) -> Array:
        """Inverts `split`."""
        (down, across), side = self.counts, self.side
        rest = x.shape[2:]
        x = x.reshape(-1, down, across, side, side, *rest).swapaxes(2, 3)
        x = x.reshape(-1, down * side, across * side, *rest)[:, : self.rows, : self.columns]
        return x.reshape(-1, self.rows * self.columns, *rest)

    def segment_ids(self, batch: int) -> tuple[Array, Array] | None:
        """Returns 1 for tokens of the grid and 0 for padding; None where nothing is padded."""
        if self.rows % self.side == 0 and self.columns % self.side == 0:
            return None
        ids = self.split(jnp.ones((batch, self.rows * self.columns), jnp.int32))
        return ids, ids

    def whole(self, weights: Array) -> Array:
        """Weights `[batch * windows, heads, side², side²]` as `[batch, heads, tokens, tokens]`."""
        tokens = self.rows * self.columns
        with jax.ensure_compile_time_eval():
            numbers = np.array(self.split(1 + jnp.arange(tokens)[None])) - 1  # -1: padding
        places = np.where(numbers < 0, tokens, numbers)  # Beyond the end: dropped.
        windows, heads = len(places), weights.shape[1]
        weights = weights.reshape(-1, windows, *weights.shape[1:]).swapaxes(1, 2)
        empty = jnp.zeros((len(weights), heads, tokens, tokens), weights.dtype)
        queries, keys = places[:, :, None], places[:, None, :]
        return empty.at[:, :, queries, keys].set(weights, mode="drop")


def windows_of_blocks(
    grid: tuple[int, int], side: int, global_blocks: Sequence[int], depth: int
) -> list[Windows | None]:
    """Returns the windows of each block; an empty list where all blocks attend to all tokens."""
    if not side:
        return []
    windows = Windows(*grid, side)
    return [None if i in global_blocks else windows for i in range(depth)]


def check_windows(window: int, global_blocks: Sequence[int], depth: int) -> None:
    """Raises a `UserError` where `config.model` asks for windows that cannot be."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise UserError(f"window={window!r}: write a number of tokens, 0 for none")
    if global_blocks and not window:
        raise UserError("global_blocks are exceptions from window; write window=14, say")
    wrong = [number for number in global_blocks if number not in range(depth)]
    if wrong:
        raise UserError(f"global_blocks has {wrong[0]!r}; the {depth} blocks count from 0")


def check_kept(window: int, position_bias: str, block_positions: bool) -> None:
    """Raises a `UserError` if a model with these fields cannot encode a part of the patches."""
    if window or position_bias != "none" or block_positions:
        raise UserError(
            "windows, position_bias and block_positions need all patches; write window=0,"
            " position_bias='none' and block_positions=False"
        )
