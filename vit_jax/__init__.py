"""Vision Transformers in JAX: train, evaluate, fine-tune, look inside.

    import vit_jax

    config = vit_jax.config.load("digits")  # a recipe, or a file; see `vit-jax train --keys`
    config.optim.lr = 3e-4
    outcome = vit_jax.train(config, "runs/digits")
    metrics = vit_jax.evaluate("runs/digits")

    predictor = vit_jax.Predictor.from_workdir("runs/digits")
    probability = predictor.predict(["photo.jpg"])["probability"]  # float32 [1, classes]
    vectors = vit_jax.features("runs/digits", ["photo.jpg"])  # float32 [1, dim]
    vit_jax.export("runs/digits", "served", "stablehlo")

    vit_jax.list_models("vit_s*")  # list_models("dinov2", pretrained=True): weights on the hub
    backbone, weights = vit_jax.build("facebook/dinov2-base", pretrained=True)
    model = vit_jax.build("vit_b16", num_classes=1000)
    params = vit_jax.checkpoints.load("checkpoint.npz", model)
    logits = model.apply({"params": params}, images)  # images: [n, 224, 224, 3] in [-1, 1]
    maps = vit_jax.attention_maps(model, params, images)

Each name loads its module when it is first used, so that `import vit_jax` costs nothing. `help` of
each function gives shapes, units and errors.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_jax import attention, checkpoints, config, data, models, optim, report, tasks
    from vit_jax.attention import attention_maps
    from vit_jax.checkpoints.pretrained import build
    from vit_jax.inference.export import export
    from vit_jax.inference.features import features
    from vit_jax.inference.predict import Predictor
    from vit_jax.models import list_models
    from vit_jax.training.from_python import evaluate, train
    from vit_jax.version import __version__

_SUBMODULES = ("attention", "checkpoints", "config", "data", "models", "optim", "report", "tasks")
_HOMES = {
    "__version__": "version",
    "Predictor": "inference.predict",
    "attention_maps": "attention",
    "build": "checkpoints.pretrained",
    "evaluate": "training.from_python",
    "export": "inference.export",
    "features": "inference.features",
    "list_models": "models",
    "train": "training.from_python",
}
"""Names of this module, and the submodules that define them."""

__all__ = [
    "Predictor",
    "__version__",
    "attention",
    "attention_maps",
    "build",
    "checkpoints",
    "config",
    "data",
    "evaluate",
    "export",
    "features",
    "list_models",
    "models",
    "optim",
    "report",
    "tasks",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
