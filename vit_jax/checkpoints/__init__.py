"""Checkpoints: those of this package (Orbax, `store`) and other codebases' files, in and out.

`load` reads any of them into a model's parameters, `save` writes them for other codebases.
"""

from vit_jax.checkpoints.fit.report import MergeReport
from vit_jax.checkpoints.formats import FORMATS
from vit_jax.checkpoints.loading import (
    load,
    load_with_report,
    model_config,
    pooling_of,
    towers_config,
)
from vit_jax.checkpoints.saving import save

__all__ = [
    "FORMATS",
    "MergeReport",
    "load",
    "load_with_report",
    "model_config",
    "pooling_of",
    "save",
    "towers_config",
]
