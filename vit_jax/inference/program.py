"""A trained model as a program: one function of a batch, with its parameters, ready to be exported.

A program is traced with an attention that runs on every platform, because the machine that exports
is seldom the one that serves.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.inference.predict import Predictor
from vit_jax.models import TowerOutputs
from vit_jax.tasks import Adapted, BaseTask
from vit_jax.types import Array, Features, Params

PLATFORMS = ("cpu", "cuda", "tpu")
OUTPUTS = ("answers", "features", "text")
WEIGHTS = ("float32", "bfloat16", "int8")

_SCALE = "@scale"
"""The end of the name of the factors that kernels in int8 are multiplied by."""

_ROUNDED_TO_INT8 = ("kernel", "embedding")
"""Parameters whose products take most of the weights. Biases, norms and tokens stay as they are."""

Function = Callable[[Mapping[str, Array], Array], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of one batch.

    Attributes:
      function: maps (weights by name, inputs) to outputs by name.
      weights: arrays by name, in host memory.
      name: the name of the input: `images` or `tokens`.
      input: shape and dtype of the inputs. The first axis is a number, or a symbol if any number of
        rows is allowed.
      meaning: the input in words.
      weights_as: how floats are stored, one of `WEIGHTS`.
    """

    function: Function
    weights: Mapping[str, np.ndarray]
    name: str
    input: jax.ShapeDtypeStruct
    meaning: str
    weights_as: str = "float32"

    @property
    def batch(self) -> int | None:
        """The number of rows; None for any number."""
        rows = self.input.shape[0]
        return rows if isinstance(rows, int) else None

    def __call__(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the outputs as the model computes them in this process."""
        return jax.device_get(self._jitted(self.weights, inputs))

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs, in the order in which JAX flattens them."""
        return sorted(self.outputs)

    @functools.cached_property
    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the outputs by name."""
        return self._jitted.eval_shape(self._shapes, self.input)

    @functools.cached_property
    def _shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self.weights.items()}

    @functools.cached_property
    def _jitted(self) -> Any:
        return jax.jit(self.function)

    @functools.cached_property
    def traced(self) -> jax.extend.core.ClosedJaxpr:
        """The program as JAX traces it, a function of the weights by name and the inputs."""
        return self._jitted.trace(self._shapes, self.input).jaxpr

    @functools.cached_property
    def exported(self) -> jax.export.Exported:
        """The program in StableHLO, for every platform of `PLATFORMS`."""
        return jax.export.export(self._jitted, platforms=PLATFORMS)(self._shapes, self.input)


def build(
    predictor: Predictor,
    *,
    outputs: str = "answers",
    include_preprocessing: bool = False,
    batch: int | None = None,
    weights: str = "float32",
) -> Program:
    """Returns the program of a trained model; see `vit_jax.export` for the arguments.

    Raises:
      UserError: the model has no such outputs.
    """
    task, params = _portable(predictor.task), predictor.params
    shape: tuple[int, ...] = predictor.task.image_spec.shape
    dtype: np.dtype = np.dtype(np.float32)
    meaning = "images as the model takes them (see Preprocessing)"
    name = "images"
    if outputs == "text":
        function, shape, dtype = _text_function(task, predictor)
        params = _without(params, "backbone")
        name, meaning = "tokens", "token numbers, as the run's preprocessing makes them"
    elif include_preprocessing:
        dtype, meaning = np.dtype(np.uint8), "pixels, 0 to 255"
        params = predictor.prepared_params if outputs == "answers" else params
        function = _of_pixels(task.predict if outputs == "answers" else _features(task))
    else:
        function = _features(task, is_normalized=True) if outputs == "features" else _raw(task)
        params = _without(params, "text")
    if outputs == "features":
        params = {"backbone": params["backbone"]}
    flat = flax.traverse_util.flatten_dict(jax.device_get(nn.unbox(params)), sep="/")
    stored = {k: v for name, x in flat.items() for k, v in _stored(name, x, weights).items()}
    rows = batch or jax.export.symbolic_shape("batch")[0]
    inputs = jax.ShapeDtypeStruct((rows, *shape), dtype)
    return Program(_of_flat(function), stored, name, inputs, meaning, weights)


def _without(params: Params, tower: str) -> Params:
    """Returns the parameters of a model but for one tower and its projection, if it has two."""
    return {name: x for name, x in params.items() if name not in (tower, f"{tower}_proj")}


def _of_flat(function: Callable[[Params, Array], dict[str, Array]]) -> Function:
    def of_flat(weights: Mapping[str, Array], inputs: Array) -> dict[str, Array]:
        whole = {
            name: _unpacked(x, weights.get(name + _SCALE))
            for name, x in weights.items()
            if not name.endswith(_SCALE)
        }
        return function(flax.traverse_util.unflatten_dict(whole, sep="/"), inputs)

    return of_flat


def _unpacked(array: Array, scale: Array | None) -> Array:
    if scale is not None:
        return array.astype(jnp.float32) * scale
    return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array


def _stored(name: str, array: np.ndarray, weights: str) -> dict[str, np.ndarray]:
    """Returns a parameter by name as it is stored: as it is, halved, or in int8 with its scale.

    A scale belongs to each index of the last axis, the outputs of a kernel, and, from three axes
    on, of the first one, along which layers are stacked.
    """
    array = np.asarray(array)
    if array.dtype != np.float32 or weights == "float32":
        return {name: array}
    if weights == "bfloat16":
        return {name: array.astype(jnp.bfloat16)}
    if name.rpartition("/")[2] not in _ROUNDED_TO_INT8 or array.ndim < 2:
        return {name: array}
    axes = tuple(range(min(1, array.ndim - 2), array.ndim - 1))
    scale = np.maximum(np.abs(array).max(axis=axes, keepdims=True), 1e-30) / 127
    return {name: np.round(array / scale).astype(np.int8), name + _SCALE: scale}


def _of_pixels(function: Callable[[Params, Any], dict[str, Array]]) -> Any:
    return lambda params, images: function(params, {"image": images})


def _raw(task: BaseTask) -> Any:
    """Returns a function of normalized images, whose outputs are those of the model itself."""

    def raw(params: Params, images: Array) -> dict[str, Array]:
        found: Any = task.model.apply({"params": params}, images)
        if isinstance(found, TowerOutputs):
            assert found.image is not None
            return {"image_vector": found.image}
        if isinstance(found, tuple):
            return dict(zip(("scores", "boxes"), found, strict=True))
        return {"logits": found}

    return raw


def _features(task: BaseTask, *, is_normalized: bool = False) -> Any:
    backbone = task.model.backbone

    def features(params: Params, batch: Any) -> dict[str, Array]:
        images = batch if is_normalized else task.inputs(batch)
        found: Features = backbone.apply({"params": params["backbone"]}, images)
        return {"features": found.vector()}

    return features


def _text_function(task: BaseTask, predictor: Predictor) -> tuple[Any, tuple[int, ...], np.dtype]:
    tokens = predictor.info.spec.get("tokens")
    if models.text_tower_of(task.model) is None or tokens is None:
        raise UserError("outputs=text is for runs that learned images and texts")

    def text(params: Params, tokens: Array) -> dict[str, Array]:
        found: Any = task.model.apply({"params": params}, tokens=tokens)
        return {"text_vector": found.text}

    return text, tokens.shape[-1:], np.dtype(np.int32)


def _portable(task: BaseTask) -> BaseTask:
    """Returns the task with a model that computes attention by plain matrix products.

    Adapters are left behind, because the parameters of a predictor hold them merged.
    """
    task = task.task if isinstance(task, Adapted) else task
    towers = {name: getattr(task.model, name, None) for name in ("backbone", "text")}
    plain: dict[str, Any] = {
        name: tower.clone(attention="xla")
        for name, tower in towers.items()
        if isinstance(tower, nn.Module) and hasattr(tower, "attention")
    }
    return dataclasses.replace(task, model=task.model.clone(**plain)) if plain else task
