"""Biases of attention logits that depend on the places of the two tokens alone."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.layers.basic import Linear, check_choice
from vit_jax.models.layers.initialization import with_axes
from vit_jax.types import Array

KINDS = ("none", "table", "shared_table", "mlp", "shared_mlp")


@dataclasses.dataclass(frozen=True)
class PositionBiasSpec:
    """A relative position bias of images of one size.

    kind: "table" learns a bias for every offset of two patches (Bao et al. 2022, BEiT); a class
      token has three more, from it, to it, and to itself. "mlp" computes it from the logarithms of
      the offset (Liu et al. 2022, Swin V2, as in timm), and gives the class token none.
    grid: (rows, columns). num_prefix: the number of tokens before the patches, 0 or 1.
    hidden: the width of the MLP.
    """

    kind: str
    grid: tuple[int, int]
    num_prefix: int
    hidden: int

    def make(self, num_heads: int, name: str) -> nn.Module:
        """Returns the module that computes the bias, float32 `[1, heads, tokens, tokens]`."""
        return PositionBias(self, num_heads, name=name)


class PositionBias(nn.Module):
    """The bias of one layer, or of all layers together.

    Parameters: `table` `[offsets, heads]`, row offset first, from negative to positive; for "mlp"
    `dense1` `[2, hidden]` and `dense2` `[hidden, heads]`.
    """

    spec: PositionBiasSpec
    num_heads: int

    @nn.compact
    def __call__(self) -> Array:
        """Returns `[1, heads, tokens, tokens]`, queries first."""
        rows, columns = self.spec.grid
        count = (2 * rows - 1) * (2 * columns - 1)
        numbers, prefix = _offsets(self.spec.grid), self.spec.num_prefix
        if self.spec.kind == "table":
            init = with_axes(nn.initializers.zeros, (None, "heads"))
            shape = (count + 3 * prefix, self.num_heads)
            table = self.param("table", init, shape, jnp.float32)
            if prefix:
                numbers = np.pad(numbers, ((1, 0), (1, 0)))
                numbers[0, :], numbers[:, 0], numbers[0, 0] = count, count + 1, count + 2
            return jnp.moveaxis(table[numbers], -1, 0)[None]
        places = np.stack(
            np.meshgrid(*(np.arange(1 - n, n) for n in self.spec.grid), indexing="ij")
        )
        places = np.moveaxis(np.sign(places) * np.log1p(np.abs(places)), 0, -1).reshape(-1, 2)
        hidden = Linear((self.spec.hidden,), (None, None), name="dense1")(jnp.float32(places))
        table = Linear((self.num_heads,), (None, "heads"), name="dense2")(nn.relu(hidden))
        bias = jnp.moveaxis(table[numbers], -1, 0)[None]
        return jnp.pad(bias, ((0, 0), (0, 0), (prefix, 0), (prefix, 0)))


def _offsets(grid: Sequence[int]) -> np.ndarray:
    """Returns the number of the offset from every patch to every patch, `[patches, patches]`."""
    rows, columns = (axis.ravel() for axis in np.indices(grid))
    down = rows[:, None] - rows + grid[0] - 1
    across = columns[:, None] - columns + grid[1] - 1
    return down * (2 * grid[1] - 1) + across


def check_bias(kind: str, num_prefix: int, *, drops: bool) -> None:
    """Raises `UserError` where a model cannot have such a bias."""
    check_choice("position_bias", kind, KINDS)
    if kind == "none":
        return
    if num_prefix > 1:
        raise UserError(f"position_bias={kind!r} takes no tokens but a class token and patches")
    if drops:
        raise UserError(f"position_bias={kind!r} needs the whole grid of patches; write"
                        " patch_drop=0 and window=0")  # fmt: skip
