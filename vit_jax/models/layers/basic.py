"""The basic layers of every model: projections, norms, MLPs, patches, drop path.

Parameters are float32 and carry logical axis names (listed in `vit_jax.models`); computation runs
in `dtype`. What a module returns has the dtype it computed in, unless its docstring says otherwise.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.errors import UserError, nearest
from vit_jax.models.layers.initialization import SCHEMES, Initializer, with_axes
from vit_jax.models.layers.resize import resize_patch_kernel
from vit_jax.types import Array, Params

NORM_EPSILON = 1e-6

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    # Hendrycks and Gimpel 2016: exact, its tanh approximation, and its sigmoid approximation, with
    # which OpenAI's CLIP models were trained.
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": nn.silu,
}


def check_choice(what: str, value: str, valid: Collection[str]) -> None:
    """Raises `UserError` unless `value` is one of `valid`."""
    if value not in valid:
        raise UserError(f"{what}={value!r} is not known; {nearest(str(value), valid)}")


def check_rate(what: str, value: float) -> None:
    """Raises `UserError` unless `value` is a probability below 1."""
    if not 0.0 <= value < 1.0:
        raise UserError(f"{what}={value} is not a rate; write a number from 0 to below 1")


def check_least(least: int, **values: int) -> None:
    """Raises `UserError` unless each of `values` is at least `least`."""
    for what, value in values.items():
        if value < least:
            raise UserError(f"{what}={value}: write {least} or more")


def check_patch(patch_size: int | Sequence[int]) -> None:
    """Raises `UserError` unless `patch_size` is one positive side or two."""
    sides = (patch_size,) * 2 if isinstance(patch_size, int) else tuple(patch_size)
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"patch_size={patch_size!r}: write pixels, 1 or more, or (height, width)")


def flattened(init: Initializer, num_in: int) -> Initializer:
    """Returns `init` of a matrix, reshaped: fan-in and fan-out count whole groups of axes.

    The first `num_in` axes of the shape are inputs, the others outputs.
    """

    def init_flat(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        matrix = (math.prod(shape[:num_in]), math.prod(shape[num_in:]))
        return init(key, matrix, dtype).reshape(shape)

    return init_flat


def lift(x: Array, ndim: int) -> Array:
    """Returns `x` with leading axes of size 1 up to `ndim`, so that broadcasting is explicit."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


class Linear(nn.Module):
    """An affine map from the last `num_in` axes of its input to `features` new last axes.

    Attributes:
      features: sizes of the new axes.
      axes: logical names of the kernel's axes, inputs first.
      num_in: how many trailing axes of the input are contracted.
      use_bias: whether a bias is added.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_in: int = 1
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    bias_init: Initializer = nn.initializers.zeros
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel_init = with_axes(flattened(self.kernel_init, self.num_in), self.axes)
        inputs = x.shape[x.ndim - self.num_in :]
        kernel = self.param("kernel", kernel_init, (*inputs, *self.features), jnp.float32)
        bias = None
        if self.use_bias:
            bias_init = with_axes(self.bias_init, self.axes[self.num_in :])
            bias = self.param("bias", bias_init, self.features, jnp.float32)
        contracted = tuple(range(x.ndim - self.num_in, x.ndim)), tuple(range(self.num_in))
        y = jax.lax.dot_general(
            x.astype(self.dtype), kernel.astype(self.dtype), (contracted, ((), ()))
        )
        return y if bias is None else y + lift(bias.astype(self.dtype), y.ndim)


NORMS = ("layernorm", "rmsnorm")


def make_norm(
    kind: str,
    *,
    name: str,
    dtype: DTypeLike,
    axis: str | tuple[str, ...] = "embed",
    use_bias: bool = True,
    epsilon: float = NORM_EPSILON,
) -> nn.Module:
    """Returns a norm over the last axis, or over several, with float32 statistics.

    axis: the logical name of the axis; a tuple of names for several.
    """
    names = (axis,) if isinstance(axis, str) else axis
    ones = with_axes(nn.initializers.ones, names)
    zeros = with_axes(nn.initializers.zeros, names)
    last = tuple(range(-len(names), 0))
    over: dict[str, Any] = {} if len(names) == 1 else {"reduction_axes": last, "feature_axes": last}
    if kind == "rmsnorm":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, scale_init=ones, name=name, **over)
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        use_bias=use_bias,
        scale_init=ones,
        bias_init=zeros,
        name=name,
        **over,
    )


MLPS = ("gelu", "swiglu")


class Mlp(nn.Module):
    """The block's MLP, `[batch, tokens, embed]` to the same shape.

    `gelu`: dense1, `activation`, dense2. `swiglu` (Shazeer 2020, "GLU variants improve
    Transformer"): dense2(silu(gate(x)) * dense1(x)); three matrices, so that people shrink
    `mlp_dim` by 2/3 to keep the parameter count.

    norm: the kind of norm before dense2 (Shleifer et al. 2021, NormFormer), or None for none.
    """

    mlp_dim: int
    kind: str
    dropout: float
    train: bool
    dtype: DTypeLike
    initialization: str = "vision_transformer"
    activation: str = "gelu_tanh"
    use_bias: bool = True
    norm: str | None = None
    norm_epsilon: float = NORM_EPSILON

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scheme = SCHEMES[self.initialization]
        fields: dict[str, Any] = {"kernel_init": scheme.kernel, "bias_init": scheme.mlp_bias}
        fields |= {"use_bias": self.use_bias, "dtype": self.dtype}

        def dense(features: int, axes: tuple[str, str], name: str) -> Linear:
            return Linear((features,), axes, name=name, **fields)

        hidden = dense(self.mlp_dim, ("embed", "mlp"), "dense1")(x)
        if self.kind == "swiglu":
            hidden = nn.silu(dense(self.mlp_dim, ("embed", "mlp"), "gate")(x)) * hidden
        else:
            hidden = ACTIVATIONS[self.activation](hidden)
        hidden = nn.with_logical_constraint(hidden, ("batch", "tokens", "mlp"))
        hidden = nn.Dropout(self.dropout, deterministic=not self.train)(hidden)
        if self.norm:
            epsilon = self.norm_epsilon
            norm = make_norm(self.norm, name="norm", axis="mlp", dtype=self.dtype, epsilon=epsilon)
            hidden = norm(hidden)
        y = dense(x.shape[-1], ("mlp", "embed"), "dense2")(hidden)
        return nn.Dropout(self.dropout, deterministic=not self.train)(y)


def drop_path(x: Array, rate: Array | float, key: Array) -> Array:
    """Zeroes whole examples of a residual branch: stochastic depth (Huang et al. 2016).

    x: `[batch, ...]`. Kept examples are divided by the probability of keeping, so that the
    expectation is unchanged. `rate` may be traced: it differs between scanned layers.
    """
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.bernoulli(key, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


EXACT_ABOVE = 0.1
"""The rate above which `drop_exact_share` drops an exact share, as in DINOv2's code."""


def drop_exact_share(x: Array, rate: Array | float, key: Array) -> Array:
    """Zeroes an exact share of the examples of a residual branch (Oquab et al. 2023, DINOv2).

    Of `batch` examples, max(int(batch · (1 - rate)), 1) random ones are kept and multiplied by
    batch / (number kept). Rates up to `EXACT_ABOVE` are those of `drop_path`.
    """
    batch = x.shape[0]
    # The small term makes up for the rounding of `rate`, so that 0.3 of 10 keeps 7.
    kept = jnp.maximum(jnp.floor(batch * (1.0 - jnp.asarray(rate, jnp.float32)) + 1e-3), 1.0)
    order = jax.random.permutation(key, batch)
    scale = jnp.zeros(batch).at[order].set(jnp.where(jnp.arange(batch) < kept, batch / kept, 0.0))
    exact = x * scale.astype(x.dtype).reshape((batch,) + (1,) * (x.ndim - 1))
    return jnp.where(rate > EXACT_ABOVE, exact, drop_path(x, rate, key))


def layer_scale(module: nn.Module, name: str, x: Array, init: float) -> Array:
    """Multiplies channels by a learned scale `name` of `module` (Touvron et al. 2021, CaiT)."""
    scale_init = with_axes(nn.initializers.constant(init), ("embed",))
    scale = module.param(name, scale_init, (x.shape[-1],), jnp.float32)
    return x * lift(scale.astype(x.dtype), x.ndim)


def init_keys(key: Any) -> dict[str, Any]:
    """Returns the random keys for `init` of any module, from a key or its shape.

    A module of Flax NNX makes the stream of its dropout when it is made. Linen modules draw their
    parameters from the first key alone.
    """
    return {"params": key, "dropout": key}


def outputs_of(model: nn.Module, params: Params, *inputs: Any, **options: Any) -> Any:
    """Returns the outputs of a model with these parameters; see `flax.linen.Module.apply`."""
    return model.apply({"params": params}, *inputs, **options)


def stored_shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Returns the shape of a parameter that `apply` was given; None while initializing."""
    if not module.has_variable("params", name):
        return None
    value: Any = module.get_variable("params", name)
    return (value.value if isinstance(value, nn.LogicallyPartitioned) else value).shape


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns `16` or `(16, 16)` as (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def cut_patches(images: Array, patch: tuple[int, int]) -> Array:
    """Cuts `[b, H, W, c]` into `[b, H // ph, W // pw, ph * pw * c]`, dropping pixels beyond."""
    ph, pw = patch
    batch, height, width, channels = images.shape
    rows, columns = height // ph, width // pw
    if not rows or not columns:
        raise UserError(
            f"images of {height}x{width} are smaller than one patch of {ph}x{pw}; "
            "write a smaller patch_size or a larger image size"
        )
    x = images[:, : rows * ph, : columns * pw]
    x = x.reshape(batch, rows, ph, columns, pw, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows, columns, ph * pw * channels)


def random_patches(key: Array, shape: tuple[int, int], drop: float) -> Array:
    """Draws the patches of every image that patch dropout keeps, int32 `[batch, n]`.

    shape: (batch, patches of an image). drop: the share of patches that are left out.
    """
    count = max(1, round(shape[1] * (1.0 - drop)))
    _, kept = jax.lax.top_k(jax.random.uniform(key, shape), count)
    return kept


def token_stride(backbone: nn.Module) -> tuple[int, int] | None:
    """Returns the pixels between tokens, down and across; None for models without patches."""
    patch = getattr(backbone, "patch_size", None)
    if patch is None:
        return None
    stem = getattr(backbone, "stem_stride", 1)
    height, width = pair(patch)
    return stem * height, stem * width


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, written as one matrix product of flattened patches.

    The kernel keeps the convolution's layout, `[ph, pw, channels, width]`. `kept_patch` is the size
    of patch it is kept for, where that differs from the patches it meets.
    """

    patch: tuple[int, int]
    channels: int
    width: int
    dtype: DTypeLike
    kept_patch: tuple[int, int] | None = None
    initialization: str = "vision_transformer"
    use_bias: bool = True

    @nn.compact
    def __call__(self, patches: Array) -> Array:
        """Maps patches `[..., ph * pw * channels]`, as from `cut_patches`, to `[..., width]`."""
        axes = ("patch_h", "patch_w", "channels", "embed")
        shape = (*(self.kept_patch or self.patch), self.channels, self.width)
        kernel_init, bias_init = SCHEMES[self.initialization].patch(math.prod(shape[:3]))
        kernel_init = with_axes(flattened(kernel_init, num_in=3), axes)
        kernel = self.param("kernel", kernel_init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias_init = with_axes(bias_init, ("embed",))
            bias = self.param("bias", bias_init, (self.width,), jnp.float32)
        kernel = resize_patch_kernel(kernel, self.patch)
        matrix = kernel.reshape(-1, self.width).astype(self.dtype)
        x = patches.astype(self.dtype) @ matrix
        return x if bias is None else x + lift(bias.astype(self.dtype), patches.ndim)
