"""Vision Transformers in JAX: train, evaluate, fine-tune, look inside.

    import vit_jax
    model = vit_jax.models.build("vit_b16", num_classes=1000)
    params = vit_jax.checkpoints.load("checkpoint.npz", model)
    logits = model.apply({"params": params}, images)

Submodules load when they are first used, so that `import vit_jax` costs nothing.
"""

import importlib
from types import ModuleType

_SUBMODULES = ("attention", "checkpoints", "config", "data", "models", "optim", "report", "tasks")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
