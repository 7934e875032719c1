"""A training step of big_vision's or vision_transformer's ViT, from the user's checkout.

`flax_step.py CODEBASE CHECKOUT MODEL BATCH_SIZE DTYPE`, served by `serving`. Nothing of this
project is imported: vision_transformer's package has the same name.
"""

import functools
import importlib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from serving import Timed, UserMistake, main

Built = tuple[nn.Module, Callable[[dict, jax.Array], jax.Array]]
"""A model, and the function that gives its logits, without dropout, for variables and images."""


def prepare(codebase: str, checkout: str, model: str, batch_size: str, dtype: str) -> Timed:
    """Builds the model with optax's AdamW and clipping, jitted, its state donated; takes two steps.

    Raises:
      UserMistake: the folder holds no such checkout, it cannot be imported here, it has no such
        model, or it cannot train the model in `dtype`.
    """
    module, logits = build(codebase, checkout, model, dtype)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.05))
    key = jax.random.key(0)
    images = jax.random.uniform(key, (int(batch_size), 224, 224, 3))
    labels = jax.random.randint(key, (int(batch_size),), 0, 1000)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state):
        def loss_fn(params):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits(params, images).astype(jnp.float32), labels
            )
            return losses.mean()

        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.jit(functools.partial(module.init, train=False))(key, images)
    state = [params, optimizer.init(params)]

    def seconds_for(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            state[:] = train_step(*state)
        jax.block_until_ready(state)
        return time.perf_counter() - started

    seconds_for(2)
    return seconds_for


def build(codebase: str, checkout: str, model: str, dtype: str) -> Built:
    """Returns the model of a checkout. Raises `UserMistake`, as `prepare` does."""
    builders = {"big_vision": _big_vision, "vision_transformer": _vision_transformer}
    if not checkout:
        raise UserMistake(
            f"bench --against={codebase}: give the folder of its checkout, as in"
            f" --against={codebase}:/path/to/{codebase}"
        )
    size = _size(codebase, model)
    sys.path.insert(0, checkout)
    try:
        return builders[codebase](*size, dtype)
    except ImportError as error:
        raise UserMistake(
            f"bench --against={codebase}:{checkout}: cannot be imported ({error}); give the folder"
            " that was cloned, and install what it needs"
        ) from error


def _big_vision(size: str, patch_size: int, dtype: str) -> Built:
    vit = importlib.import_module("big_vision.models.vit")
    in_dtype = {} if dtype == "float32" else {"dtype_mm": dtype}
    if in_dtype and not hasattr(vit._Model, "dtype_mm"):
        raise UserMistake("bench --against: this old big_vision trains its ViT in float32 alone")
    try:
        module = vit.Model(1000, variant=f"{size}/{patch_size}", pool_type="tok", **in_dtype)
    except KeyError as error:
        raise UserMistake(
            f"bench --against: big_vision has no ViT of size {size}/{patch_size}"
        ) from error
    return module, lambda params, images: module.apply(params, images)[0]


def _vision_transformer(size: str, patch_size: int, dtype: str) -> Built:
    if dtype != "float32":
        raise UserMistake("bench --against: vision_transformer's ViT trains in float32 alone")
    # This project's package has the same name and may be installed: theirs has to be found first.
    package = ModuleType("vit_jax")
    package.__path__ = [str(Path(sys.path[0]) / "vit_jax")]
    sys.modules["vit_jax"] = package
    vit = importlib.import_module("vit_jax.models_vit")
    configs = importlib.import_module("vit_jax.configs.models").MODEL_CONFIGS
    name = f"ViT-{size}_{patch_size}"
    if name not in configs:
        raise UserMistake(f"bench --against: vision_transformer has no model {name}")
    module = vit.VisionTransformer(1000, **configs[name])
    return module, lambda params, images: module.apply(params, images, train=False)


def _size(codebase: str, model: str) -> tuple[str, int]:
    """Returns ("Ti", 16) for `vit_ti16`, as both codebases write their sizes."""
    match = re.fullmatch(r"vit_([A-Za-z]+?)(\d\d)", model)
    if not match:
        raise UserMistake(
            f"bench --against={codebase} compares plain ViTs such as vit_ti16 or vit_s16,"
            f" not {model}"
        )
    return match[1] if match[1] in "gG" else match[1].capitalize(), int(match[2])


if __name__ == "__main__":
    main(prepare)
