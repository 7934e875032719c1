"""ResNets with group norm and weight standardisation: no state, no statistics over the batch.

`BiT` is the pre-activation network of Kolesnikov et al. 2020 ("Big Transfer"), the convolutional
baseline that ViTs are compared with. `PostActivationResNet` is the form that big_vision's `bit_i1k`
trains, and `ResNetStem` the same without a pooled output, which hybrids put before their
transformer (Dosovitskiy et al. 2021).

    root/conv/kernel             [7, 7, channels, 64 * width_factor]
    root/norm/{scale,bias}       (all but BiT)
    stage1/unit1/                stages and units count from 1
      conv1, conv2, conv3/kernel [1, 1, ...], [3, 3, ...], [1, 1, ...]
      norm1, norm2, norm3/{scale,bias}
      conv_proj/kernel           where a unit changes the shape
      norm_proj/{scale,bias}     (all but BiT)
    norm/{scale,bias}            (BiT)
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.errors import UserError
from vit_jax.models.layers.initialization import with_axes
from vit_jax.models.registry import Variant
from vit_jax.models.traits import Traits, named_fields
from vit_jax.plugins import float_dtype
from vit_jax.types import Array, Features

NUM_GROUPS = 32
ROOT_WIDTH = 64
EXPANSION = 4

Padding = str | Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Style:
    """The details in which published ResNets differ.

    pads_evenly: convolutions pad (kernel - 1) / 2 on every side, as PyTorch does; else by XLA's
      SAME, which pads only bottom and right where the stride leaves an odd number.
    variance_epsilon: added to the variance of a kernel; None adds 1e-5 to its deviation.
    norm_epsilon: that of group norms.
    """

    pads_evenly: bool = False
    variance_epsilon: float | None = None
    norm_epsilon: float = 1e-6


BIT = Style(pads_evenly=True, variance_epsilon=1e-10, norm_epsilon=1e-5)
HYBRID = Style()


class StdConv(nn.Module):
    """A convolution without bias whose kernel is standardised over height, width and inputs.

    Weight standardisation (Qiao et al. 2019): zero mean and unit (population) deviation for every
    output channel. Input and output are `[batch, height, width, channels]`.

    """

    features: int
    kernel_size: int
    dtype: DTypeLike
    stride: int = 1
    style: Style = HYBRID

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = self.kernel_size
        init = with_axes(
            nn.initializers.lecun_normal(), ("conv_h", "conv_w", "conv_in", "conv_out")
        )
        shape = (size, size, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape, jnp.float32)
        kernel = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
        deviation = jnp.std(kernel, axis=(0, 1, 2), keepdims=True)
        epsilon = self.style.variance_epsilon
        kernel = kernel / (
            deviation + 1e-5 if epsilon is None else jnp.sqrt(deviation**2 + epsilon)
        )
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            _padding(size, self.style.pads_evenly),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return nn.with_logical_constraint(y, ("batch", None, None, "conv_out"))


def _padding(size: int, evenly: bool) -> Padding:
    return [((size - 1) // 2, (size - 1) // 2)] * 2 if evenly else "SAME"


def _group_norm(name: str, dtype: DTypeLike, style: Style, scale_init: float = 1.0) -> nn.GroupNorm:
    scale = with_axes(nn.initializers.constant(scale_init), ("conv_out",))
    bias = with_axes(nn.initializers.zeros, ("conv_out",))
    return nn.GroupNorm(
        NUM_GROUPS,
        epsilon=style.norm_epsilon,
        # Mean square less squared mean loses digits; the published BiTs were trained without.
        use_fast_variance=style != BIT,
        dtype=dtype,
        scale_init=scale,
        bias_init=bias,
        name=name,
    )


class PostActivationUnit(nn.Module):
    """A bottleneck, 1x1 - 3x3 - 1x1, with norm and ReLU after every convolution (ResNet v1)."""

    width: int
    stride: int
    dtype: DTypeLike
    style: Style

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def conv(features: int, size: int, name: str, stride: int = 1) -> StdConv:
            return StdConv(features, size, self.dtype, stride, self.style, name=name)

        def norm(name: str, scale_init: float = 1.0) -> nn.GroupNorm:
            return _group_norm(name, self.dtype, self.style, scale_init)

        out = EXPANSION * self.width
        shortcut = x
        if x.shape[-1] != out or self.stride != 1:
            shortcut = norm("norm_proj")(conv(out, 1, "conv_proj", self.stride)(x))
        y = nn.relu(norm("norm1")(conv(self.width, 1, "conv1")(x)))
        y = nn.relu(norm("norm2")(conv(self.width, 3, "conv2", self.stride)(y)))
        # Every unit starts as the identity.
        y = norm("norm3", scale_init=0.0)(conv(out, 1, "conv3")(y))
        return nn.relu(shortcut + y)


class PreActivationUnit(nn.Module):
    """A bottleneck with norm and ReLU before every convolution (He et al. 2016, ResNet v2)."""

    width: int
    stride: int
    dtype: DTypeLike
    style: Style

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def conv(features: int, size: int, name: str, stride: int = 1) -> StdConv:
            return StdConv(features, size, self.dtype, stride, self.style, name=name)

        def activate(name: str, x: Array) -> Array:
            return nn.relu(_group_norm(name, self.dtype, self.style)(x))

        out = EXPANSION * self.width
        y = activate("norm1", x)
        shortcut = x
        if x.shape[-1] != out or self.stride != 1:
            shortcut = conv(out, 1, "conv_proj", self.stride)(y)
        y = conv(self.width, 1, "conv1")(y)
        y = conv(self.width, 3, "conv2", self.stride)(activate("norm2", y))
        return shortcut + conv(out, 1, "conv3")(activate("norm3", y))


class _Stage(nn.Module):
    """Units of one width; the first one strides."""

    unit: type[nn.Module]
    num_units: int
    width: int
    stride: int
    dtype: DTypeLike
    style: Style

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.num_units):
            stride = self.stride if i == 0 else 1
            unit = self.unit(self.width, stride, self.dtype, self.style, name=f"unit{i + 1}")
            x = unit(x)
        return x


class _Root(nn.Module):
    """The 7x7 convolution and the pooling that take the image to a quarter of its size."""

    width: int
    dtype: DTypeLike
    style: Style

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = StdConv(self.width, 7, self.dtype, 2, self.style, name="conv")(x)
        if self.style.pads_evenly:
            # BiT pads with zeros, not -inf, and has no norm here.
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            return nn.max_pool(x, (3, 3), (2, 2), "VALID")
        x = nn.relu(_group_norm("norm", self.dtype, self.style)(x))
        return nn.max_pool(x, (3, 3), (2, 2), "SAME")


def check_width_factor(width_factor: float) -> int:
    """Returns the width of the root. Raises `UserError` where groups do not divide it."""
    width = ROOT_WIDTH * width_factor
    if width % NUM_GROUPS:
        raise UserError(f"width_factor={width_factor} is not a multiple of 0.5; write one")
    return int(width)


class ResNetStem(nn.Module):
    """Root and stages of a post-activation ResNet: images to a feature map.

    Attributes:
      stages: number of units of each stage; () leaves the root alone (stride 4). Stages after the
        first halve the map.
      width_factor: multiplies all channels, 64 in the root.
    """

    stages: Sequence[int]
    width_factor: float
    dtype: DTypeLike
    style: Style = HYBRID

    @nn.compact
    def __call__(self, images: Array) -> Array:
        return _maps(images, self.stages, self.width_factor, self.dtype, self.style)[-1]


def _maps(
    images: Array,
    stages: Sequence[int],
    width_factor: float,
    dtype: DTypeLike,
    style: Style,
) -> list[Array]:
    """Returns the output of the root and of each stage, inside a compact method."""
    width = check_width_factor(width_factor)
    unit = PreActivationUnit if style == BIT else PostActivationUnit
    maps = [_Root(width, dtype, style, name="root")(images)]
    for i, num_units in enumerate(stages):
        stride = 1 if i == 0 else 2
        stage = _Stage(unit, num_units, width * 2**i, stride, dtype, style, name=f"stage{i + 1}")
        maps.append(stage(maps[-1]))
    return maps


class BiT(nn.Module):
    """A pre-activation ResNet backbone; images of any size.

    Attributes:
      stages: number of units of each stage. width_factor: multiplies all channels.
      dtype: of computation; parameters are float32.
    """

    stages: Sequence[int]
    width_factor: float = 1.0
    dtype: DTypeLike = "float32"

    def __post_init__(self) -> None:
        check_width_factor(self.width_factor)
        float_dtype("dtype", self.dtype)
        super().__post_init__()

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        return Traits("a BiT", frozenset(named_fields(self, BiT)))

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Features:
        """Encodes images, float `[batch, height, width, channels]`; `train` changes nothing."""
        del train
        dtype = jnp.dtype(self.dtype)
        _, *maps = _maps(images, self.stages, self.width_factor, dtype, BIT)
        maps[-1] = nn.relu(_group_norm("norm", dtype, BIT)(maps[-1]))
        return _pooled(maps)


class PostActivationResNet(BiT):
    """A post-activation ResNet backbone (ResNet v1 with group norm); images of any size.

    The last norm of every unit starts at zero, shortcuts have norms, and none precedes the head.
    The attributes are those of `BiT`.
    """

    @nn.nowrap
    def traits(self) -> Traits:
        """Returns what code outside may ask about this model; see `vit_jax.models.traits`."""
        return Traits("a post-activation ResNet", frozenset(named_fields(self, BiT)))

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Features:
        """Encodes images, float `[batch, height, width, channels]`; `train` changes nothing."""
        del train
        dtype = jnp.dtype(self.dtype)
        _, *maps = _maps(images, self.stages, self.width_factor, dtype, HYBRID)
        return _pooled(maps)


def _pooled(maps: Sequence[Array]) -> Features:
    pooled = jnp.mean(maps[-1], axis=(1, 2), dtype=jnp.float32)
    return Features(grid=maps[-1], pooled=pooled, stages=tuple(maps))


STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

VARIANTS = {
    f"bit_r{depth}x{factor}": Variant(BiT, {"stages": stages, "width_factor": factor})
    for depth, stages in STAGES.items()
    for factor in (1, 2, 3, 4)
} | {"bit_v1_r50x1": Variant(PostActivationResNet, {"stages": STAGES[50], "width_factor": 1})}
