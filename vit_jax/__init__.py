"""Vision Transformers in JAX: train, evaluate, fine-tune, look inside.

    import vit_jax
    model = vit_jax.models.build("vit_b16", num_classes=1000)
    params = vit_jax.checkpoints.load("checkpoint.npz", model)
    logits = model.apply({"params": params}, images)

    predictor = vit_jax.Predictor.from_workdir("runs/photos")
    probability = predictor.predict(["photo.jpg"])["probability"]

Submodules load when they are first used, so that `import vit_jax` costs nothing.
"""

import importlib
from typing import Any

_SUBMODULES = ("attention", "checkpoints", "config", "data", "models", "optim", "report", "tasks")
_HOMES = {"Predictor": "inference.predict"}  # Names of this module that submodules define.


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES, *_HOMES])
