"""Training steps of the models of big_vision and vision_transformer, from the user's checkouts."""

import importlib
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import vit_jax
from vit_jax.errors import UserError

_PLAIN_VIT = re.compile(r"vit_([A-Za-z]+?)(\d\d)")


class FlaxStep:
    """Such a model with optax's AdamW and clipping, jitted, its state donated.

    peer: "big_vision" or "vision_transformer". checkout: the folder that was cloned.

    Raises:
      UserError: no checkout of that in the folder, it cannot be imported here, it has no such
        model, or cannot train it in `dtype`.
    """

    def __init__(self, peer: str, checkout: str, model: str, batch_size: int, dtype: str):
        build = {"big_vision": _big_vision, "vision_transformer": _vision_transformer}[peer]
        try:
            module, logits = build(checkout, model, dtype)
        except ImportError as error:
            raise UserError(
                f"bench --against={peer}:{checkout}: cannot be imported ({error}); give the folder"
                " that was cloned, and install what it needs"
            ) from error
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.05)
        )
        key = jax.random.key(0)
        images = jax.random.uniform(key, (batch_size, 224, 224, 3))
        labels = jax.random.randint(key, (batch_size,), 0, 1000)

        def step(params, state):
            def loss(params):
                found = optax.softmax_cross_entropy_with_integer_labels(
                    logits(params, images).astype(jnp.float32), labels
                )
                return found.mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        self._step = jax.jit(step, donate_argnums=(0, 1))
        params = jax.jit(partial(module.init, train=False))(key, images)
        self._state = params, optimizer.init(params)
        self.first_seconds = self.seconds(2)

    def seconds(self, steps: int) -> float:
        """How long so many steps take, one after the other."""
        started = time.perf_counter()
        for _ in range(steps):
            self._state = self._step(*self._state)
        jax.block_until_ready(self._state)
        return time.perf_counter() - started


_Built = tuple[nn.Module, Callable[[dict, jax.Array], jax.Array]]
"""The model, and its logits, without dropout, for variables and images."""


def _big_vision(checkout: str, model: str, dtype: str) -> _Built:
    sys.path.insert(0, checkout)
    vit = importlib.import_module("big_vision.models.vit")
    in_dtype = {} if dtype == "float32" else {"dtype_mm": dtype}
    if in_dtype and not hasattr(vit._Model, "dtype_mm"):
        raise UserError("bench --against: this old big_vision trains its ViT in float32 alone")
    size, patch_size = _size("big_vision", model)
    try:
        module = vit.Model(1000, variant=f"{size}/{patch_size}", pool_type="tok", **in_dtype)
    except KeyError as error:
        raise UserError(
            f"bench --against: big_vision has no ViT of size {size}/{patch_size}"
        ) from error
    return module, lambda params, images: module.apply(params, images)[0]


def _vision_transformer(checkout: str, model: str, dtype: str) -> _Built:
    if dtype != "float32":
        raise UserError("bench --against: vision_transformer's ViT trains in float32 alone")
    size, patch_size = _size("vision_transformer", model)
    # Its package has the name of this one, so its modules are found beside ours.
    vit_jax.__path__.append(str(Path(checkout) / "vit_jax"))
    vit = importlib.import_module("vit_jax.models_vit")
    configs = importlib.import_module("vit_jax.configs.models").MODEL_CONFIGS
    name = f"ViT-{size}_{patch_size}"
    if name not in configs:
        raise UserError(f"bench --against: vision_transformer has no model {name}")
    module = vit.VisionTransformer(1000, **configs[name])
    return module, lambda params, images: module.apply(params, images, train=False)


def _size(peer: str, model: str) -> tuple[str, int]:
    """`vit_ti16` → ("Ti", 16), as both call their sizes. Raises `UserError` at another family."""
    match = _PLAIN_VIT.fullmatch(model)
    if not match:
        raise UserError(
            f"bench --against={peer} compares plain ViTs such as vit_ti16 or vit_s16, not {model}"
        )
    return match[1] if match[1] in "gG" else match[1].capitalize(), int(match[2])
