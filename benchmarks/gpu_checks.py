"""Correctness on a GPU, which `gpu.py` checks before it measures any speed."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_steps import Measured, Sizes, Skipped

from vit_jax import models
from vit_jax.checkpoints import loading
from vit_jax.checkpoints.fit.inference import infer_model
from vit_jax.errors import UserError
from vit_jax.models.layers.attention import attend

TESTS = Path(__file__).parents[1] / "tests"

FLOAT32 = 5e-5
"""Largest error of float32 outputs, over the largest output. On CPUs the tests hold 1e-5."""

BFLOAT16 = {"outputs": 0.02, "gradients": 0.05}
"""Largest distance of bfloat16 results from those in float32, over the norm of the latter."""

FUSED = 2.0
"""Fused attention may be this many times as far from float32 as XLA's attention in bfloat16."""


class Wrong(Exception):
    """A result is outside its bound. The message is one line."""


def goldens(sizes: Sizes, _: Measured) -> dict[str, Any]:
    """Compares tiny models in float32 with the outputs that timm computed for them.

    They are those of tests/golden/timm_tiny: plain, distilled and rotary ViTs, Mixers, and others.

    Raises:
      Wrong: an output is further off than `FLOAT32`.
    """
    for folder in ("checkpoints", "golden"):
        sys.path.append(str(TESTS / folder))
    import golden_cases

    kinds = sorted(path.parent.name for path in TESTS.glob("golden/timm_tiny/*/io.npz"))
    kinds = [kind for kind in kinds if kind not in ("bit", "hybrid")][: sizes.goldens]
    errors = {}
    for kind in kinds:
        stored, path = golden_cases.load_timm(kind), str(TESTS / "golden/timm_tiny" / kind)
        weights = loading.read_weights(path)
        model = infer_model(weights)
        size = stored["images"].shape[1:3]
        params, _ = loading.fit(weights, model, path, image_size=size)
        with jax.default_matmul_precision("highest"):
            outputs = jax.jit(model.apply)({"params": params}, stored["images"])
        largest = np.abs(stored["outputs"]).max()
        errors[kind] = float(np.abs(np.asarray(outputs) - stored["outputs"]).max() / largest)
    worst = max(errors, key=errors.get)
    return _within({"largest_error": errors[worst]}, {"largest_error": FLOAT32}, worst, len(kinds))


def bfloat16(sizes: Sizes, _: Measured) -> dict[str, Any]:
    """Compares the pooled outputs and gradients of a ViT-B/16 in bfloat16 with those in float32.

    Raises:
      Wrong: one is further off than `BFLOAT16`.
    """
    images = jax.random.normal(jax.random.key(0), (2, 224, 224, 3))
    exact = models.build("vit_b16", pooling="mean", **sizes.fields)
    params = jax.jit(exact.init)(jax.random.key(1), images)["params"]

    def outputs_and_gradients(model):
        def loss_fn(params):
            pooled = model.apply({"params": params}, images).pooled.astype(jnp.float32)
            return jnp.sum(jnp.sin(pooled)), pooled

        gradients, pooled = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
        return {"outputs": pooled, "gradients": gradients}

    with jax.default_matmul_precision("highest"):
        wanted = outputs_and_gradients(exact)
    found = outputs_and_gradients(exact.clone(dtype=jnp.bfloat16))
    errors = {name: _distance(found[name], wanted[name]) for name in BFLOAT16}
    return _within(errors, BFLOAT16, "vit_b16", 1)


def fused_attention(sizes: Sizes, _: Measured) -> dict[str, Any]:
    """Compares fused attention in bfloat16, outputs and gradients, with XLA's in float32.

    Raises:
      Wrong: it is more than `FUSED` times as far off as XLA's in bfloat16.
      Skipped: it does not run here.
    """
    errors, bounds = {}, {}
    for tokens in sizes.tokens:
        keys = jax.random.split(jax.random.key(tokens), 4)
        arrays = [jax.random.normal(key, (2, tokens, 4, 64)) for key in keys]
        with jax.default_matmul_precision("highest"):
            wanted = _attention(arrays, "xla")
        halves = [array.astype(jnp.bfloat16) for array in arrays]
        try:
            fused = _distance(_attention(halves, sizes.fused), wanted)
        except UserError as error:
            raise Skipped(str(error)) from error
        errors[f"{sizes.fused}_{tokens}_tokens"] = fused
        bounds[f"{sizes.fused}_{tokens}_tokens"] = FUSED * _distance(
            _attention(halves, "xla"), wanted
        )
    return _within(errors, bounds, sizes.fused, len(errors))


def _attention(arrays: list[jax.Array], implementation: str) -> Any:
    """Returns outputs of attention and their gradients, for a query, key, value and cotangent."""
    *inputs, cotangent = arrays

    @jax.jit
    def run(*inputs):
        outputs, pull = jax.vjp(lambda *x: attend(*x, implementation=implementation), *inputs)
        return outputs, pull(cotangent)

    return run(*inputs)


def _distance(found: Any, wanted: Any) -> float:
    """Returns the norm of the difference of two trees over the norm of the second."""

    def norm(tree):
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
        return np.sqrt(sum(np.sum(leaf**2) for leaf in leaves))

    def difference(a, b):
        return np.asarray(a, np.float64) - np.asarray(b, np.float64)

    return float(norm(jax.tree.map(difference, found, wanted)) / norm(wanted))


def _within(
    errors: dict[str, float], bounds: dict[str, float], what: str, cases: int
) -> dict[str, Any]:
    for name, error in errors.items():
        if not error <= bounds[name]:  # Also for NaN.
            raise Wrong(f"{what}: {name} is off by {error:.2g}, more than {bounds[name]:.2g}")
    return {"errors": errors, "bounds": bounds, "cases": cases}
