"""One map of features at several resolutions: a neck between any backbone and a dense head.

level1/, level2/, ...     in the order of the scales
  up1/, up2/, ...         {kernel `[dim, 2, 2, dim / 2]`, bias}, each doubling rows and columns
  up_norm1/, ...          {scale, bias}, between them
  conv1/kernel            [1, 1, dim, width]
  conv2/kernel            [3, 3, width, width]
  norm1/, norm2/          {scale, bias}, behind each convolution
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.layers.basic import Linear, make_norm
from vit_jax.models.layers.initialization import with_axes
from vit_jax.types import Array

SCALES = tuple(2.0**power for power in range(3, -4, -1))


def check_scales(scales: Sequence[float]) -> None:
    """Raises a `UserError` unless these can be the scales of a `Pyramid`."""
    known = isinstance(scales, Sequence) and all(scale in SCALES for scale in scales)
    if not known or len(set(scales)) < len(scales):
        raise UserError(
            f"config.task.pyramid={scales!r}: write a list of different powers of two,"
            f" {SCALES[-1]} to {SCALES[0]}"
        )


class Pyramid(nn.Module):
    """The simple feature pyramid of plain backbones (Li et al. 2022, ViTDet, section 3).

    Each level is made of the last map alone, by transposed convolutions or max pooling, and none
    looks at another.

    Attributes:
      scales: sides of the levels, in those of the map; the paper has 4, 2, 1 and 0.5.
      width: channels of every level; the paper's is 256.
    """

    scales: Sequence[float]
    width: int

    @nn.compact
    def __call__(self, grid: Array) -> tuple[Array, ...]:
        """Maps `[b, rows, columns, dim]` to `[b, scale * rows, scale * columns, width]` per scale.

        Raises:
          UserError: pooling would leave some of the grid out.
        """
        return tuple(
            _Level(scale, self.width, name=f"level{i + 1}")(grid)
            for i, scale in enumerate(self.scales)
        )


class _Level(nn.Module):
    scale: float
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(round(math.log2(max(self.scale, 1)))):
            if i:
                x = nn.gelu(self._norm(f"up_norm{i}", x.dtype)(x))
            x = _doubled(x, f"up{i + 1}")
        if self.scale < 1:
            x = _pooled(x, round(1 / self.scale))
        for i, size in enumerate((1, 3)):
            x = self._conv(size, f"conv{i + 1}", x.dtype)(x)
            x = self._norm(f"norm{i + 1}", x.dtype)(x)
            x = nn.with_logical_constraint(x, ("batch", None, None, "conv_out"))
        return x

    @nn.nowrap
    def _conv(self, size: int, name: str, dtype: jnp.dtype) -> nn.Conv:
        axes = ("conv_h", "conv_w", "conv_in", "conv_out")
        init = with_axes(nn.initializers.lecun_normal(), axes)
        return nn.Conv(
            self.width, (size, size), use_bias=False, dtype=dtype, kernel_init=init, name=name
        )

    @nn.nowrap
    def _norm(self, name: str, dtype: jnp.dtype) -> nn.Module:
        return make_norm("layernorm", name=name, dtype=dtype, axis="conv_out")


def _doubled(x: Array, name: str) -> Array:
    """Applies a transposed convolution whose stride is its kernel; it halves the channels."""
    features = (2, 2, x.shape[-1] // 2)
    axes = ("conv_in", None, None, "conv_out")
    init = nn.initializers.lecun_normal()
    return spread(Linear(features, axes, dtype=x.dtype, kernel_init=init, name=name)(x))


def spread(x: Array) -> Array:
    """Maps `[b, rows, columns, n, m, dim]` to `[b, rows * n, columns * m, dim]`, in place."""
    batch, rows, columns, down, across, channels = x.shape
    return x.swapaxes(2, 3).reshape(batch, rows * down, columns * across, channels)


def _pooled(x: Array, size: int) -> Array:
    rows, columns = x.shape[1:3]
    if rows % size or columns % size:
        raise UserError(
            f"config.task.pyramid: a scale of {1 / size:g} needs rows and columns that {size}"
            f" divides, not {rows}x{columns} tokens; leave it out or change config.data.pp's size"
        )
    return nn.max_pool(x, (size, size), (size, size))


def merge(levels: Sequence[Array]) -> Array:
    """Adds all levels at the places of the finest one (Kirillov et al. 2019, Panoptic FPN)."""
    finest = max(level.shape[:3] for level in levels)
    return sum(jax.image.resize(level, (*finest, level.shape[3]), "bilinear") for level in levels)
