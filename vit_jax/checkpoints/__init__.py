"""Checkpoints: our own (Orbax, `store`) and other codebases' files, in and out."""

from vit_jax.checkpoints.loading import load, load_with_report
from vit_jax.checkpoints.report import MergeReport

__all__ = ["MergeReport", "load", "load_with_report"]
